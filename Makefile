# Every target sets itself up: a virtual environment in .venv, installed from constraints.txt,
# once for each change of pyproject.toml or constraints.txt.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWER := .venv-lower
ROOMS := engine handlers losses
LINKS := $(ROOMS:%=.typing/diptych/%)

# One thread for each process: the tests run side by side and their numbers do not depend on it.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.DEFAULT_GOAL := help
.PHONY: help install train test test-long test-lower-bounds check lint types architecture format \
	public-names docs serve-docs dist clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP)  ## Make .venv and install everything that development needs

train: $(STAMP)  ## Train an image-text model on the emoji that ship with the repository
	$(BIN)/python -m examples.emoji.train $(ARGS)

test: $(STAMP) $(LINKS)  ## Run the tests (ARGS="tests/engine -k resume" selects some)
	$(TEST) -n $(WORKERS) --dist loadgroup -m "not slow" $(ARGS)

test-long: $(STAMP) $(LINKS)  ## Run the slow tests too
	$(TEST) -n $(WORKERS) --dist loadgroup $(ARGS)

test-lower-bounds: $(LOWER)/.installed $(LINKS)  ## Run the tests with the oldest versions allowed
	OMP_NUM_THREADS=1 $(LOWER)/bin/python -m pytest -n $(WORKERS) --dist loadgroup \
		-m "not slow" $(ARGS)

$(LOWER)/.installed: pyproject.toml constraints.txt constraints-lower.txt
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test]'
	$(LOWER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement constraints-lower.txt
	touch $@

check: lint types architecture  ## Run every static check

lint: $(STAMP)  ## Check style and formatting with Ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) $(LINKS)  ## Check types with mypy, over the installed namespace
	$(BIN)/mypy

architecture: $(STAMP)  ## Check the arrows between the rooms and the house rules
	$(TEST) -q tests/test_architecture.py

# Type checkers and the API pages do not follow an editable install; they follow these links.
.typing/diptych/%:
	mkdir -p $(@D)
	ln -sfn ../../$* $@

format: $(STAMP)  ## Format the code and fix what Ruff can fix
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

public-names: $(STAMP)  ## Write down the public names after a deliberate change
	$(BIN)/python -m tests.test_public_names

docs: $(STAMP) $(LINKS)  ## Build the documentation into site/
	$(MKDOCS) build --strict --quiet

serve-docs: $(STAMP) $(LINKS)  ## Serve the documentation and rebuild it on every change
	$(MKDOCS) serve

dist: $(STAMP)  ## Build the wheel and the sdist into dist/ and check their metadata
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:  ## Remove everything that was built, the environment included
	rm -rf $(VENV) $(LOWER) .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site
	rm -rf *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
