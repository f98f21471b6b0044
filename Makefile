# Every target does its own set-up: an environment in $(VENV), with the versions of constraints.txt.
# It is repeated only when one of pyproject.toml and constraints.txt has changed.
#
#   PYTHON=python3.11      the interpreter that the environment is made with (3.11 or newer)
#   VENV=/some/folder      where the environment goes
#   TORCH_INDEX=<url>      a further package index for torch. On Linux the default build brings the CUDA libraries
#                          (some gigabytes); https://download.pytorch.org/whl/cpu has the builds without
#   ARGS='...'             further arguments for pytest (make test), imaml demo (make demo) or benchmarks/gpu.py (make gpu)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := bilevel applications tests docs benchmarks examples README.md

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format types imports docs gpu package ci clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make the environment

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "expected Python 3.11 or newer as '$(PYTHON)'; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(READY)  ## train on generated characters: untrained, first order and iMAML side by side
	$(BIN)/imaml demo $(ARGS)

# One thread per test process: the processes share the cores already.
test: $(READY)  ## all tests, in parallel and in random order
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(READY)  ## write what `make lint` asks for, as far as ruff can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(READY)  ## mypy
	$(BIN)/mypy

imports: $(READY)  ## which part may import which (pyproject.toml)
	$(BIN)/lint-imports

docs: $(READY)  ## the pages, strictly: docs/_build/html/index.html
	$(BIN)/sphinx-build -W --keep-going -n -q docs docs/_build/html
	@echo "open docs/_build/html/index.html"

gpu: $(READY)  ## on a machine with a GPU: tests, benchmarks, Table 2; again goes on where it was (docs/gpu.md)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

package: $(READY)  ## build the distributions, and try the wheel in an environment that has nothing else
	TORCH_INDEX='$(TORCH_INDEX)' $(BIN)/python tests/packaging/check.py $(ARGS)

ci:  ## everything that a change must pass, in a fresh environment
	.ci/run

clean:  ## remove the environment, the caches and the built pages
	rm -rf $(VENV) docs/_build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
