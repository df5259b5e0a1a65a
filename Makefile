# Every target sets itself up: a virtual environment in .venv, installed from constraints.txt,
# once for each change of pyproject.toml or constraints.txt. The editable install is strict, which
# type checkers can follow: a link in build/ for each module, made anew when a module comes or goes.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
LOWER := .venv-lower
PACKAGES := face engine handlers losses recipes
MODULES := build/modules.txt

PIP := -m pip install --quiet --disable-pip-version-check
EDITABLE := --config-settings editable_mode=strict --editable

# One thread for each process: the tests run side by side and their numbers do not depend on it.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.DEFAULT_GOAL := help
.PHONY: help install train test test-long test-lower-bounds check lint types architecture format \
	public-names docs serve-docs dist clean look-for-modules

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt $(EDITABLE) '.[dev]'
	touch $@

$(LOWER)/.installed: pyproject.toml constraints.txt constraints-lower.txt
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python $(PIP) --constraint constraints.txt $(EDITABLE) '.[test]'
	$(LOWER)/bin/python $(PIP) --no-deps --requirement constraints-lower.txt
	touch $@

# Written only if it changes: a new time means other modules, or that build/ was removed.
$(MODULES): look-for-modules
	@mkdir -p $(@D)
	@find $(PACKAGES) -name '*.py' -o -name '*.pyi' -o -name py.typed | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# Without the network. Both environments share the links.
%/.linked: %/.installed $(MODULES)
	$*/bin/python $(PIP) --no-deps --no-build-isolation $(EDITABLE) .
	touch $@

install: $(VENV)/.linked  ## Make .venv and install everything that development needs

train: install  ## Train an image-text model on the emoji that ship with the repository
	$(BIN)/python -m examples.emoji.train $(ARGS)

test: install  ## Run the tests (ARGS="tests/engine -k resume" selects some)
	$(TEST) -n $(WORKERS) --dist loadgroup -m "not slow" $(ARGS)

test-long: install  ## Run the slow tests too
	$(TEST) -n $(WORKERS) --dist loadgroup $(ARGS)

test-lower-bounds: $(LOWER)/.linked  ## Run the tests with the oldest versions allowed
	OMP_NUM_THREADS=1 $(LOWER)/bin/python -m pytest -n $(WORKERS) --dist loadgroup \
		-m "not slow" $(ARGS)

check: lint types architecture  ## Run every static check

lint: install  ## Check style and formatting with Ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## Check types with mypy, over the installed package
	$(BIN)/mypy

architecture: install  ## Check the imports between packages and the house rules
	$(TEST) -q tests/test_architecture.py

format: install  ## Format the code and fix what Ruff can fix
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

public-names: install  ## Write down the public names after a deliberate change
	$(BIN)/python -m tests.test_public_names

docs: install  ## Build the documentation into site/
	$(MKDOCS) build --strict --quiet

serve-docs: install  ## Serve the documentation and rebuild it on every change
	$(MKDOCS) serve

dist: install  ## Build the wheel and the sdist into dist/ and check their metadata
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:  ## Remove everything that was built, the environment included
	rm -rf $(VENV) $(LOWER) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site
	rm -rf *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
