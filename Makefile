# One front door: every target sets up what it needs, in .venv, from pyproject.toml and .ci/constraints.txt alone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
INPUTS := pyproject.toml .ci/constraints.txt

# A second environment with the oldest transformers that pyproject.toml allows; huggingface_hub is the one that fits it.
OLDEST   := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
VENV_OLD := .venv-oldest
OLD_TESTS := tests/unit/cache tests/unit/attention/test_states.py tests/integration
# These need the harness, install packages in environments of their own, or build C++: nothing that transformers changes.
OLD_LEFT := -k 'not inductor' $(patsubst %,--ignore tests/integration/test_%.py,lm_eval new_plugin_project plugins_page stranger)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest lint format types arrows docs bench clean

help:     ## Show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

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

test: $(VENV)/.dev     ## Run the tests, but for the slow ones
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev ## Run the tests that compile many kernels, or install packages in environments of their own
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m slow $(ARGS)

$(VENV_OLD)/.test: $(INPUTS)
	@echo "Installing kvquant into $(VENV_OLD), with transformers $(OLDEST) ..."
	$(PYTHON) -m venv $(VENV_OLD)
	@{ grep -vE '^(transformers|huggingface_hub)==' .ci/constraints.txt; echo transformers==$(OLDEST); } \
		> $(VENV_OLD)/constraints.txt
	$(VENV_OLD)/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint $(VENV_OLD)/constraints.txt --editable '.[test]'
	@touch $@

test-oldest: $(VENV_OLD)/.test ## Run the tests that concern transformers with the oldest one allowed
	$(VENV_OLD)/bin/python -m pytest --numprocesses auto --dist loadfile $(OLD_LEFT) $(OLD_TESTS) $(ARGS)

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
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev    ## Time the caches side by side
	$(BIN)/kvquant bench $(ARGS)

clean:    ## Remove what was built
	rm -rf $(VENV) $(VENV_OLD) build dist site .*_cache .hypothesis
