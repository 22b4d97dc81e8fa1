# One front door: every target sets up what it needs, in .venv, from pyproject.toml and .ci/constraints.txt alone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
INPUTS := pyproject.toml .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types arrows docs bench clean

help:     ## Show this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvquant needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python $(INPUTS)
	@echo "Installing kvquant into $(VENV) (the first time takes a few minutes) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing the backends' libraries and the development tools ..."
	$(PIP) --editable '.[dev,quanto,hqq,bitsandbytes]'
	@touch $@

demo: $(VENV)/.run     ## Generate text with a quantised cache, beside the full-precision one
	$(BIN)/kvquant demo $(ARGS)

test: $(VENV)/.dev     ## Run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/.dev     ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev   ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev    ## Check types
	$(BIN)/mypy

arrows: $(VENV)/.dev   ## Check that imports point one way
	$(BIN)/lint-imports

docs: $(VENV)/.dev     ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev    ## Time the caches side by side
	$(BIN)/kvquant bench $(ARGS)

clean:    ## Remove what was built
	rm -rf $(VENV) build dist site .*_cache .hypothesis
