# make test, make bench: set up a virtual environment, then test or measure. make gpu: see README.md.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup test bench lint aot gpu clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[triton,test]"
	touch $@

test: $(READY)
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal --durations=10

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-quiet -q

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tables of every Triton configuration and every instantiation of csrc/ (needs nvcc), compiled for
# sm_80, sm_90 and sm_100, with the bounds of their hot loops.
aot: $(READY)
	$(BIN)/python -m tests.aot
	$(BIN)/python -m tests.cubin

# A machine with an NVIDIA GPU, nvcc, its own torch and Triton, and no network. Each part has its own
# limit, 9 minutes in all, and is reported even if an earlier one failed; the first failure is the exit
# status. Results go to OUT.
OUT ?= build/gpu
COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
GPU_WORKERS ?= 8
ARCHITECTURE = $(shell $(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
SANITIZED := tests/test_operators.py -k "(triton or cuda) and (3x3 or aligned) and geometries" -p no:cacheprovider
SANITIZER := timeout -s INT 35 compute-sanitizer --error-exitcode 1
gpu:
	mkdir -p $(OUT)
	@set -o pipefail; status=0; \
	part() { name=$$1; shift; echo "== $$name"; "$$@" 2>&1 | tee $(OUT)/$$name.log || { code=$$?; echo "== $$name: exit $$code"; [ $$status -ne 0 ] || status=$$code; }; }; \
	part environment env COMMIT=$(COMMIT) $(PYTHON) -m benchmarks.machine $(OUT)/machine.json; \
	part extension env HYPERCONV_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=$(ARCHITECTURE) timeout -s INT 80 $(PYTHON) setup.py build_ext --inplace; \
	part tests timeout -s INT 150 $(PYTHON) -m pytest tests -q -n $(GPU_WORKERS) $(addprefix --ignore=tests/test_,triton_aot.py cuda_aot.py build.py host_runtime.py examples.py) --durations=10; \
	part benchmarks timeout -s INT 180 $(PYTHON) -m pytest benchmarks/ --benchmark-only --benchmark-quiet -q --benchmark-json=$(OUT)/benchmarks.json; \
	part report timeout 15 $(PYTHON) -m benchmarks.report $(OUT)/benchmarks.json --output $(OUT)/report; \
	for tool in memcheck racecheck initcheck; do part $$tool $(SANITIZER) --tool $$tool $(PYTHON) -m pytest $(SANITIZED) -q -x; done; \
	exit $$status

gpu: SHELL := /bin/bash

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
