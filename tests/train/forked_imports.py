"""What a process imports once, before others are forked from it (`tests/train/forked.py`)."""

import gc

gc.disable()  # every collection would look through all that is there: a fifth of the time

import deepspeed  # noqa: E402, F401
import pytest  # noqa: E402, F401

import deepalign.evaluate.suite  # noqa: E402, F401
import tests.train.fault_worker  # noqa: E402
import tests.train.linear_worker  # noqa: E402
import tests.train.worker  # noqa: E402, F401

gc.freeze()
gc.enable()
