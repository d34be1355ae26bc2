# Every target sets up .venv first if need be (once: the stamp file is written last, and only if all went well).
# Needs Python >= 3.11 and make, no compiler. Another Python: make test PYTHON=/path/to/python

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := constraints.txt
ARGS ?=
# Test processes; 0: none but pytest's own.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal
# Each makes another instruction set do the arithmetic, as on another processor.
CPU_SETTINGS := ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=generic

# Triton is not in constraints.txt: it is part of PyTorch's builds for CUDA, and useless to .venv. This is the version that
# the PyTorch of constraints.txt requires there.
TRITON := triton==3.7.1
TRITON_VENV := .venv-triton
TRITON_STAMP := $(TRITON_VENV)/.installed

# Two names for two generations of pip: either one pins what builds the package as well as what it needs.
PIP_ENV := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-cpus test-triton test-interop check format lock clean

help: ## show this list
	@echo "make <target>:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-13s%s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv with the pinned packages of constraints.txt
	@echo "$(VENV) is ready."

quickstart: $(STAMP) ## train a TopK SAE and a KronSAE on the bundled language model, compare them
	$(BIN)/kronsae quickstart $(ARGS)

test: $(STAMP) ## run the tests but the slow ones; some of them: make test ARGS="tests/core -k gradient"
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## run every test, core and kernels also under each of the CPU settings
	@status=0; \
	$(MAKE) --no-print-directory test-cpus || status=1; \
	$(PYTEST) $(ARGS) || status=1; \
	exit $$status

test-cpus: $(STAMP) ## run the tests of core and kernels under each of the CPU settings
	@status=0; \
	for setting in $(CPU_SETTINGS); do \
	  echo "tests/core and tests/kernels under $$setting"; \
	  env $$setting $(PYTEST) --quiet tests/core tests/kernels || { status=1; echo "failed under $$setting"; }; \
	done; \
	exit $$status

test-triton: $(TRITON_STAMP) ## test the GPU kernels without a GPU, in .venv-triton: in the interpreter, and compiled
	@status=0; \
	TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python -m pytest -W "ignore:invalid value encountered:RuntimeWarning" \
	  tests/kernels -k "gpu or blocks" $(ARGS) || status=1; \
	TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python -m pytest -W "ignore:invalid value encountered:RuntimeWarning" \
	  tests/bench/test_checklist.py tests/training/test_other_device.py $(ARGS) || status=1; \
	$(TRITON_VENV)/bin/python -m pytest tests/bench/test_compiled.py $(ARGS) || status=1; \
	exit $$status

test-interop: ## run the checks against others' packages, each group in its own .venv-interop; make test-interop ARGS=saelens
	@python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && $$python scripts/test_interop.py $(ARGS)

check: $(STAMP) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## resolve constraints.txt anew
	@python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && PYTHON="$$python" sh scripts/lock.sh

clean: ## remove .venv and the caches; runs/ stays
	rm -rf $(VENV) .venv-interop $(TRITON_VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is there and works is kept: after a failure halfway the next run goes on from what is installed.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && \
	  echo "Making $(VENV) with $$($$python --version)." && \
	  $$python -m venv --clear $(VENV); \
	fi
	@echo "Installing the packages of $(CONSTRAINTS); some minutes the first time, nothing the next."
	@$(PIP_ENV) $(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(STAMP)

$(TRITON_STAMP): pyproject.toml $(CONSTRAINTS)
	@if ! $(TRITON_VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && \
	  echo "Making $(TRITON_VENV) with $$($$python --version)." && \
	  $$python -m venv --clear $(TRITON_VENV); \
	fi
	@echo "Installing the packages of $(CONSTRAINTS) and $(TRITON); some minutes the first time, nothing the next."
	@$(PIP_ENV) $(TRITON_VENV)/bin/python -m pip install --quiet --editable ".[dev,gpu]" "$(TRITON)"
	@touch $(TRITON_STAMP)
