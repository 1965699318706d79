# Everything that a fresh clone needs. `make demo` and `make test` set up .venv by themselves.
SHELL  := bash
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: help install demo test check format lint types edge gpu clean

help:
	@echo "make demo     train, export, prove and run an encoder on the images that ship with the project"
	@echo "make test     run the tests"
	@echo "make check    format, lint, types, tests: what CI asks for"
	@echo "make edge     install the wheel without PyTorch in an empty environment and test it there"
	@echo "make gpu      the tests that need a CUDA GPU; what they print goes to benchmarks/results/gpu.txt"
	@echo "make install  only make $(VENV) and install into it"

install: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "byol-deploy needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV) (PyTorch and CUDA libraries: about 6 GB, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/byol-deploy demo

test: $(READY)
	$(BIN)/python -m pytest

check: format lint types test

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

gpu: $(READY)
	set -o pipefail; { $(BIN)/byol-deploy doctor; $(BIN)/python -m pytest -v -m gpu tests/gpu; } 2>&1 | tee benchmarks/results/gpu.txt

edge:
	tests/edge/run $(PYTHON)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
