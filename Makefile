# make test, make oldest, make bench: set up a virtual environment, then test or measure. make sweep: the rest
# of the tests' long rows. make gpu: see docs/evidence.md.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINE := hyperconv_ext/_cpu.abi3.so
NO_ENGINES := HYPERCONV_BUILD_CUDA=0 HYPERCONV_BUILD_CPU=0 # made once, in the tree that all environments share

.PHONY: setup test sweep oldest oldest-quick models environments bench experiments wheel lint docs docs-check aot gpu gpu-quick clean
.NOTPARALLEL: # what is needed is made from left to right: the environment, in it the engine

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[triton,test,docs]"
	touch $@

# The CPU engine, which the set-up has built: again where its source is newer. What was built once must
# build again; where nothing was, for want of a compiler, the tests and benchmarks go without.
$(ENGINE): setup.py $(wildcard csrc/cpu/*)
	HYPERCONV_BUILD_CUDA=0 HYPERCONV_BUILD_CPU=$(or $(HYPERCONV_BUILD_CPU),$(if $(wildcard $@),1,auto)) \
		$(BIN)/python setup.py -q build_ext --inplace

# What times the host comes last and alone: busy neighbours would be measured, too.
XDIST := -n $(WORKERS) --dist worksteal
test: $(READY) $(ENGINE)
	$(BIN)/python -m pytest tests benchmarks/test_harness.py benchmarks/test_report.py $(XDIST) --durations=10 -m "not alone and not sweep"
	$(BIN)/python -m pytest tests -q -m alone

# What `make test` leaves out: the cases, minutes each or many, of which it runs a sample.
sweep: $(READY) $(ENGINE)
	$(BIN)/python -m pytest tests $(XDIST) --durations=10 -m sweep

# All of them with the oldest torch and Triton that pyproject.toml promises, in an environment of its own.
# PyPI has this torch for CUDA only, several GB; it runs on a CPU.
OLDEST ?= .venv-oldest
OLDEST_REQUIREMENTS := "torch==2.10.*" "triton==3.6.*" "numpy<2.4"
OLDEST_QUICK := $(addprefix tests/test_,autograd.py hypernet.py modules.py functional.py import.py \
	launches.py operators.py hyper_operator.py) -k "not operator or cpu or 3x3 or groups"
$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q $(OLDEST_REQUIREMENTS)
	$(NO_ENGINES) $(OLDEST)/bin/python -m pip install -q -e ".[triton,test]" $(OLDEST_REQUIREMENTS)
	touch $@

oldest oldest-quick: BIN := $(OLDEST)/bin
oldest: $(OLDEST)/.ready $(ENGINE)
	$(BIN)/python -m pytest tests $(XDIST) --durations=10 -m "not alone"

oldest-quick: $(OLDEST)/.ready $(ENGINE)
	$(BIN)/python -m pytest $(OLDEST_QUICK) -q $(XDIST) -m "not alone and not sweep"

# Models of other packages: converted, trained, brought back. In an environment of its own, torch and
# torchvision in one call, since each needs the other's version.
MODELS ?= .venv-models
MODELS_TORCH ?= torch==2.14.1 torchvision==0.29.1
$(MODELS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(MODELS)
	$(MODELS)/bin/python -m pip install -q $(MODELS_TORCH)
	$(NO_ENGINES) $(MODELS)/bin/python -m pip install -q -e ".[models]"
	touch $@

# The two environments beside the first, for who wants them made while other work goes on.
environments: $(OLDEST)/.ready $(MODELS)/.ready

models: BIN := $(MODELS)/bin
models: $(MODELS)/.ready $(ENGINE)
	$(BIN)/python -m pytest tests/models $(XDIST) --durations=5

bench: $(READY) $(ENGINE)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-quiet -q

# The experiments of docs/experiments, hours; with QUICK=1 a first look at each, minutes. MNIST is the folder
# of its four files. What is finished is not run again.
MNIST ?=
ON_MNIST := mnist_noise kernels lenet denoise large_kernels resize
ON_OTHER_DATA := training_speed lesions motif
experiments: $(READY) $(ENGINE)
	@test -d "$(MNIST)" || { echo "MNIST: expected the folder of its four idx .gz files, got '$(MNIST)'; pass MNIST=DIR"; exit 2; }
	set -e; for name in $(ON_MNIST); do $(BIN)/python examples/$$name.py --mnist "$(MNIST)" $(if $(QUICK),--quick); done
	set -e; for name in $(ON_OTHER_DATA); do $(BIN)/python examples/$$name.py $(if $(QUICK),--quick); done
	$(BIN)/python examples/parameters.py

# One wheel with the engines that can be built here, in dist/. It installs where there is no compiler.
wheel: $(READY)
	rm -rf build/lib* build/bdist* dist/hyperconv_ext-*.whl
	$(BIN)/python -W ignore setup.py -q bdist_wheel -d dist
	@ls dist/hyperconv_ext-*.whl

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation: served, and changed where a page changes; or built into build/site, without a warning
# (not --quiet: warnings that are not shown are not counted).
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-check: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# The tables of every Triton configuration and every instantiation of csrc/ (needs nvcc), compiled for
# sm_80, sm_90 and sm_100, with the bounds of their hot loops.
aot: $(READY)
	$(BIN)/python -m tests.aot
	$(BIN)/python -m tests.cubin

# A machine with an NVIDIA GPU, nvcc, its own torch and Triton, and no network: everything in 9 minutes,
# or the build, the gate and the decisive benchmarks in 4 (benchmarks/gpu.py). Results go to OUT.
OUT ?= build/gpu
SANITIZER ?= compute-sanitizer
COMMIT ?= $(shell git describe --always --abbrev=40 --dirty=+ --exclude='*' 2>/dev/null || echo unknown)
gpu:
	COMMIT=$(COMMIT) $(PYTHON) -m benchmarks.gpu $(OUT) --sanitizer $(SANITIZER)

gpu-quick:
	COMMIT=$(COMMIT) $(PYTHON) -m benchmarks.gpu $(OUT) --quick

clean:
	rm -rf $(VENV) $(OLDEST) $(MODELS) $(ENGINE) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
