# `make demo` and `make test` work in a fresh clone: they make .venv first (minutes, once) and say what they do.
# PIP_FLAGS passes options to pip, for example an index that holds CPU-only builds of torch.

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?=
TABLES_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Python compiles what it imports, once; to compile all that is installed would take a minute and a half.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt
NATIVE := deepalign/_native.abi3.so
COMM := $(VENV)/.comm
BENCH_FLAGS ?=
# Instruction sets under which the native kernels are tested, where the processor has them.
ISAS ?= avx512 avx2 portable

# Versions of torch that the built wheel is tried with.
TORCHES ?= 2.13.0 2.11.0

.PHONY: help install demo tables test test-training test-kernels test-rest test-isas test-utility check bench bench-full docs notebook sanitize package matrix clean
.PHONY: triton interpret-loss interpret-rest codegen
.PHONY: gpu gpu-compile gpu-check gpu-check-rest gpu-loss gpu-sampler gpu-linear gpu-rest gpu-train gpu-sanitize gpu-profile
help:
	@echo "make demo      build the microworld, attack it, repair it under DeepSpeed, report in runs/demo/"
	@echo "make tables    the paper's Tables 1 to 5 and Figure 4 on the microworld, three seeds; runs/suite/"
	@echo "make test      the test suite (CPU), the native kernels under every instruction set, the GPU kernels"
	@echo "make check     ruff and mypy"
	@echo "make bench     the headline benchmarks (CPU, minutes); table and plot in runs/bench/"
	@echo "make bench-full  all of them; results, table and plot in benchmarks/results/, and the README's table"
	@echo "make docs      docs/api.md, the API reference, and docs/training-keys.md, from the docstrings"
	@echo "make notebook  examples/microworld.ipynb run, and what it shows stored in it (minutes)"
	@echo "make sanitize  the native kernels' tests under AddressSanitizer and UBSan"
	@echo "make package   sdist and wheel, tried in new environments with torch $(TORCHES)"
	@echo "make triton    the GPU kernels without a GPU: in Triton's interpreter, and what they compile to (part of make test)"
	@echo "make test-utility  tests that need lm-eval and judgezoo, which it installs"
	@echo "make matrix    every ZeRO stage x LoRA x family x accumulation x ranks against float64 (a quarter of an hour)"
	@echo "make gpu-train a 1B-shaped model through run.py on a GPU: speed and memory, linear against eager loss"
	@echo "make gpu       tests and benchmarks that need a GPU: gpu-compile, gpu-check, gpu-loss, gpu-sampler, gpu-linear,"
	@echo "               gpu-check-rest, gpu-rest, at most GPU_SECONDS each; results in benchmarks/results/"
	@echo "make gpu-sanitize, gpu-profile    compute-sanitizer and ncu on the kernels, where these are installed"

install: $(READY) $(NATIVE) $(COMM)

$(READY): pyproject.toml setup.py constraints.txt
	@echo "== setting up $(VENV): the package with its dev and train extras, versions from constraints.txt"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	@echo "== compiling the native CPU kernels while the rest is installed"
	@$(BIN)/python setup.py -q build_ext --inplace & compiling=$$!; \
		DEEPALIGN_NO_NATIVE=1 $(INSTALL) -e ".[dev,train]" && wait $$compiling
	@touch $(READY)
	@touch -c $(NATIVE)

$(COMM): $(READY)
	@echo "== compiling DeepSpeed's communication ops for the CPU (a minute; otherwise its first start does it)"
	@DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m deepalign.train.launch
	@touch $(COMM)

demo: $(READY) $(COMM)
	@echo "== demo: base -> aligned -> completed, attacked at every stage; results in runs/demo/"
	$(BIN)/deepalign demo $(DEMO_FLAGS)

tables: $(READY) $(NATIVE) $(COMM)
	@echo "== tables: attacks, defences and recovery on the microworld; results in runs/suite/"
	$(BIN)/deepalign evaluate suite --config microworld $(TABLES_FLAGS)

# Editable installs do not rebuild by themselves. Without a compiler this says so, and the reference serves.
$(NATIVE): $(READY) setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
	@echo "== building the native CPU kernels"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch -c $(NATIVE)

# Two of them run at a time, the shortest last. make would start what waits for a compilation after all that does not, so
# that the longest compile what they need themselves.
test: $(READY) $(NATIVE)
	@echo "== tests, two processes at a time: what trains, the rest, the GPU kernels interpreted and compiled, other instruction sets"
	@$(MAKE) --no-print-directory -j2 test-training test-kernels interpret-loss test-rest test-isas interpret-rest codegen

# lm-eval and judgezoo are heavy: their tests are skipped where they are not installed, as in make test.
test-utility: $(READY)
	$(INSTALL) -e ".[dev,train,utility,judges]"
	$(BIN)/python -m pytest tests/evaluate/test_utility.py tests/evaluate/test_judges.py $(PYTEST_FLAGS)

# Two processes side by side on two cores; most tests are small and gain nothing from a second thread.
TRAINING_TESTS := tests/train tests/microworld tests/evaluate tests/defenses
test-training: $(READY) $(NATIVE)
	@$(MAKE) --no-print-directory $(COMM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TRAINING_TESTS) $(PYTEST_FLAGS)

test-kernels: $(READY) $(NATIVE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels $(PYTEST_FLAGS)

test-rest: $(READY) $(NATIVE)
	@$(MAKE) --no-print-directory $(COMM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests $(addprefix --ignore ,$(TRAINING_TESTS) tests/kernels) $(PYTEST_FLAGS)

# What runs the native kernels, under the instruction sets that the run above did not take.
test-isas: $(NATIVE)
	@for isa in $(filter-out $(shell $(ISA_OF)),$(ISAS)); do \
		if test "$$(DEEPALIGN_CPU_ISA=$$isa $(ISA_OF) 2>/dev/null)" = $$isa; then \
			echo "== tests of the native kernels, $$isa"; \
			OMP_NUM_THREADS=1 DEEPALIGN_CPU_ISA=$$isa $(BIN)/python -m pytest tests/kernels $(NATIVE_TESTS) $(PYTEST_FLAGS) || exit 1; \
		else echo "== no tests under $$isa: the kernels do not run on it here"; fi; \
	done
ISA_OF = $(BIN)/python -c "from deepalign.kernels.library import cpu_isa; print(cpu_isa() or 'none')"
NATIVE_TESTS := -q --no-header -k "(native or cpu) and not compile"

# libasan must be there before Python; leaks are Python's own. Tests that start a compiler are left out.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
sanitize: $(READY)
	@echo "== building the native CPU kernels with AddressSanitizer and UBSan"
	@DEEPALIGN_CXXFLAGS="$(SANITIZERS)" $(BIN)/python setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib
	@for isa in $(ISAS); do \
		echo "== tests under AddressSanitizer and UBSan, $$isa"; \
		DEEPALIGN_CPU_ISA=$$isa ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -o pythonpath="build/sanitized/lib ." tests/kernels $(NATIVE_TESTS) $(PYTEST_FLAGS) || exit 1; \
	done

package: $(READY)
	@echo "== the wheel, built from the source distribution, in new environments with torch $(TORCHES)"
	$(BIN)/python -m tests.clean_install --torch $(TORCHES) --pip-flags "$(PIP_FLAGS)"

# Triton decides at its first import whether it interprets, hence processes of their own.
triton: $(READY)
	@echo "== Triton kernels: interpreted, and compiled for sm_80, sm_90, sm_100 and gfx942"
	@$(MAKE) --no-print-directory -j2 interpret-loss interpret-rest
	@$(MAKE) --no-print-directory codegen

interpret-loss: $(READY)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton/test_completion_loss.py $(PYTEST_FLAGS)

interpret-rest: $(READY)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton --ignore tests/triton/test_completion_loss.py $(PYTEST_FLAGS)

codegen: $(READY)
	$(BIN)/python -m benchmarks.codegen_gate

check: $(READY)
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/make_api.py

notebook: $(READY) $(NATIVE)
	$(INSTALL) nbclient ipykernel
	$(BIN)/python docs/make_notebook.py

bench: $(READY) $(NATIVE)
	@echo "== the headline benchmarks (CPU, one thread); results in runs/bench/, compared with the committed ones"
	$(BIN)/python -m benchmarks.run --out runs/bench/cpu.json $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.report runs/bench/cpu.json
	$(BIN)/python -m benchmarks.guard runs/bench/cpu.json

bench-full: $(READY) $(NATIVE)
	@echo "== all benchmarks (CPU): every instruction set, one and two threads; results in benchmarks/results/"
	$(BIN)/python -m benchmarks.run --full $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.report benchmarks/results/cpu.json --readme README.md

matrix: $(READY) $(NATIVE) $(COMM)
	@echo "== the training matrix; result in docs/results/training-matrix.md"
	$(BIN)/python -m tests.train.matrix --out docs/results --work build/matrix

# The gpu targets run on GPU_PYTHON. With another than the virtual environment's nothing is set up and nothing installed:
# make gpu GPU_PYTHON=python3, where that has torch, triton, pytest, pytest-timeout and pytest-benchmark.
GPU_PYTHON ?= $(BIN)/python
GPU_READY = $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(READY))
# GPU_FLAGS= also times the peers under torch.compile, some minutes more.
GPU_FLAGS ?= --peers eager
GPU_SECONDS ?= 180
GPU_PARTS := gpu-compile gpu-check gpu-loss gpu-sampler gpu-linear gpu-check-rest gpu-rest
RESULTS := benchmarks/results

gpu-train: $(GPU_READY)
	@echo "== training on a GPU through run.py"
	$(GPU_PYTHON) -m benchmarks.gpu_train --out $(RESULTS)/gpu-train.json $(GPU_TRAIN_FLAGS)

# What matters first; no part takes more than GPU_SECONDS, what it has measured until then is kept, and the others follow.
gpu: $(GPU_READY)
	@failed=; for part in $(GPU_PARTS); do \
		timeout --kill-after 5 $(GPU_SECONDS) $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "failed, or stopped after $(GPU_SECONDS) s:$$failed"; exit 1; }

# Every kernel once, and what is timed later compiled side by side: one after the other this takes minutes.
GPU_ONCE = $(GPU_PYTHON) -m benchmarks.gpu_once
gpu-compile: $(GPU_READY)
	@echo "== every kernel once, and the shapes that are timed"
	@$(GPU_ONCE) --rows 5 --vocab 4099 --calls loss forward & all="$$!"; \
	$(GPU_ONCE) --rows 5 --vocab 4099 --calls base position sample & all="$$all $$!"; \
	for shape in "8192 128256" "4096 151936" "16384 32000"; do \
		set -- $$shape; \
		$(GPU_ONCE) --rows $$1 --vocab $$2 --calls "loss {}" "loss in place {}" forward >/dev/null & all="$$all $$!"; \
	done; \
	for rows in 1 8 64 512; do $(GPU_ONCE) --rows $$rows --vocab 128256 --calls sample >/dev/null & all="$$all $$!"; done; \
	failed=0; for one in $$all; do wait $$one || failed=1; done; exit $$failed

# A thread's timeout also ends a test that waits for a kernel. In many processes where pytest-xdist is installed: most of
# the time goes with compiling.
GPU_PYTEST = $(GPU_PYTHON) -m pytest -m gpu --timeout-method thread --continue-on-collection-errors \
	$(shell $(GPU_PYTHON) -c "import xdist; print('-n 12')" 2>/dev/null) $(PYTEST_FLAGS)

gpu-check: $(GPU_READY)
	@echo "== tests of the kernels that need a GPU"
	$(GPU_PYTEST) tests/kernels

gpu-check-rest: $(GPU_READY)
	@echo "== other tests that need a GPU"
	$(GPU_PYTEST) tests --ignore tests/kernels

gpu-loss: $(GPU_READY)
	@echo "== the loss on a GPU, a process per shape"
	@failed=0; number=0; for shape in 8192x128256 4096x151936 16384x32000; do \
		$(GPU_PYTHON) -m benchmarks.gpu loss --shapes $$number --out $(RESULTS)/gpu-loss-$$shape.json $(GPU_FLAGS) || failed=1; \
		number=$$((number + 1)); \
	done; exit $$failed

gpu-sampler: $(GPU_READY)
	@echo "== the sampler on a GPU, in CUDA graphs"
	$(GPU_PYTHON) -m benchmarks.gpu sampler --out $(RESULTS)/gpu-sampler.json $(GPU_FLAGS)

gpu-linear: $(GPU_READY)
	@echo "== the linear loss on a GPU, beside its products, TRL and Liger"
	$(if $(GPU_READY),-$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) liger-kernel trl)
	$(GPU_PYTHON) -m benchmarks.gpu linear --out $(RESULTS)/gpu-linear.json $(GPU_FLAGS)

# Small shapes: a sanitized kernel takes a hundred times as long. `initcheck` would find what padding leaves unread.
gpu-sanitize: $(GPU_READY)
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH (it comes with the CUDA toolkit)"; exit 1; }
	@for tool in memcheck racecheck synccheck; do \
		echo "== compute-sanitizer, $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(GPU_ONCE) --rows 5 --vocab 4099 || exit 1; \
	done

gpu-profile: $(GPU_READY)
	@command -v ncu >/dev/null || { echo "ncu is not on PATH (it comes with the CUDA toolkit)"; exit 1; }
	@mkdir -p $(RESULTS)
	ncu --set full --clock-control none --kernel-name "regex:(rows|select|sample|divergence)_kernel" --csv --page raw --log-file $(RESULTS)/gpu-profile.csv \
		$(GPU_ONCE) --rows 1024 --vocab 128256

gpu-rest: $(GPU_READY)
	@echo "== the other benchmarks that need a GPU"
	@mkdir -p $(RESULTS)
	$(GPU_PYTHON) -m pytest benchmarks -m gpu --continue-on-collection-errors --benchmark-enable \
		--benchmark-json $(RESULTS)/gpu.json $(PYTEST_FLAGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
