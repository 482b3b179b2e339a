"""Tiny models run on one thread, as in the sampler's tests."""

from tests.sampling.conftest import one_thread

__all__ = ["one_thread"]
