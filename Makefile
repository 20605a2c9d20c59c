# Every target makes its own environment (.venv) when there is none, or when pyproject.toml has changed since.
#   make quickstart    install, build the embedded data, train the tiny Scout, print what it learned
#   make test          the default suite on two workers         make test-full    and the slow tests
#   make lint          ruff, ruff format, mypy                  make format       let ruff rewrite
#   make bench         every figure of docs/benchmarks.md       make docs         the curves of runs/quickstart
#   make clean         environment and caches away; runs/ and data/built/ stay
# PYTHON=/path/to/python3.12 chooses the interpreter; EXTRAS=dev,cuda what is installed beside the package.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that really runs (a version manager's shim may exist and refuse) and can make an environment.
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if "$$p" -c '$(SUITABLE)' >/dev/null 2>&1; then command -v "$$p"; break; fi; done)
EXTRAS ?= dev
BIN := .venv/bin
STAMP := .venv/.installed

WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=15

# Compiled programs outlive the process: the second run of anything starts in seconds.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1

.PHONY: help quickstart test test-full lint format bench docs clean

help:
	@sed -n '/^# Every/,/^# PYTHON/s/^# \{0,1\}//p' Makefile

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: .venv needs Python 3.11 or newer with venv, but none was found. Install one (on Debian and Ubuntu" \
		     "python3-venv belongs to it), or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@[ -x $(BIN)/python ] || { echo "making .venv with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv .venv; }
	@echo "installing llamax[$(EXTRAS)]: about a minute"
	@$(BIN)/python -m pip install -qq --progress-bar off --no-compile --disable-pip-version-check -e '.[$(EXTRAS)]'
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' .venv/lib >/dev/null 2>&1 || true # pip would use one core
	@touch $@

quickstart: $(STAMP)
	$(BIN)/llamax data build
	$(BIN)/llamax train recipes/scout_pretrain.py:tiny --workdir runs/quickstart

test: $(STAMP)
	$(PYTEST)

test-full: $(STAMP)
	$(PYTEST) -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: $(STAMP)
	$(BIN)/python docs/make_curves.py runs/quickstart docs/curves.png

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
