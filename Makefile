# Everything on a fresh machine: `make demo` trains and evaluates on real images, `make test` tests.
# Both make their own virtual environment and build the extension first; the second time is quick.

PYTHON ?= python3
VENV   ?= .venv
# Where no GPU is used, a CPU build of torch saves gigabytes: install it into $(VENV) yourself, or
# name another requirement here.
TORCH  ?= torch==2.13.0
DEMO   ?= demo

BIN     = $(VENV)/bin
RUN     = $(BIN)/python
NATIVE  = $(shell find csrc tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-quick lint format docs bench build doctor gpu-check clean

demo: build
	$(BIN)/unicom-ext pipeline --output $(DEMO)
	@echo "Open $(DEMO)/report.html"

# Kept whatever the shell says: what pytest makes of the tests takes each process five seconds.
test test-quick: export PYTHONDONTWRITEBYTECODE =

# More for pytest may stand in PYTEST: make test PYTEST="--durations=20 tests/loss"
test: build
	$(RUN) -m pytest -n 2 --dist worksteal $(PYTEST)

# A quicker answer: without what needs a compiler, other programs or many seconds.
test-quick: build
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow and not emulated" $(PYTEST)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

docs: build
	$(RUN) -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "Open build/docs/index.html"

bench: build
	$(BIN)/unicom-ext bench --quick

# With the Python that has a CUDA torch; needs no network. See docs/gpu.md for CHECK's options.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(CHECK)

doctor: build
	$(BIN)/unicom-ext doctor

build: $(VENV)/.built

$(VENV)/.built: $(VENV)/.environment CMakeLists.txt setup.py pyproject.toml $(NATIVE)
	$(RUN) -m pip install --quiet --no-build-isolation --editable '.[test]'
	@touch $@

# What the build needs comes first: with --no-build-isolation pip uses what is installed.
$(VENV)/.environment: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; set PYTHON=python3.11 or newer"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install --quiet '$(TORCH)' numpy
	$(RUN) -m pip install --quiet 'setuptools>=77' 'cmake>=3.26' ninja
	@touch $@

clean:
	rm -rf build $(VENV)/.built unicom_ext/*.so unicom_ext.egg-info
