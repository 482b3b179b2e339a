# `make demo` and `make test` work in a fresh clone: they make .venv first (minutes, once) and say what they do.
# PIP_FLAGS passes options to pip, for example an index that holds CPU-only builds of torch.

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo test check bench gpu clean
help:
	@echo "make demo   build the microworld, attack it, repair it under DeepSpeed, report in runs/demo/"
	@echo "make test   the test suite (CPU)"
	@echo "make check  ruff and mypy"
	@echo "make bench  benchmarks (CPU)"
	@echo "make gpu    tests and benchmarks that need a GPU; results in benchmarks/results/"

install: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	@echo "== setting up $(VENV): the package with its dev and train extras, versions from constraints.txt"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev,train]"
	@echo "== compiling DeepSpeed's communication ops for the CPU (a minute; otherwise its first start does it)"
	@DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m deepalign.train.launch
	@touch $(READY)

demo: $(READY)
	@echo "== demo: base -> aligned -> completed, attacked at every stage; results in runs/demo/"
	$(BIN)/deepalign demo $(DEMO_FLAGS)

test: $(READY)
	@echo "== tests"
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(READY)
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@echo "== benchmarks (CPU); results in benchmarks/results/"
	@mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks -m "not gpu" --benchmark-enable --benchmark-json benchmarks/results/cpu.json $(PYTEST_FLAGS)

gpu: $(READY)
	@echo "== tests and benchmarks that need a GPU; results in benchmarks/results/"
	@mkdir -p benchmarks/results
	$(BIN)/python -m pytest tests -m gpu $(PYTEST_FLAGS)
	$(BIN)/python -m pytest benchmarks -m gpu --benchmark-enable --benchmark-json benchmarks/results/gpu.json $(PYTEST_FLAGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
