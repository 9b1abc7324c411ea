# One verb per target; `make help` lists them. Needs make and a Python of at least 3.10, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long zoo speed docs lint format types check clean help

demo: .venv/.runtime  ## train the default network on the digits and watch its widths settle
	$(BIN)/autowidth train --auto --out runs/demo

test: .venv/.dev  ## run the fast tests
	$(BIN)/python -m pytest -n 2

test-long: .venv/.dev .venv/.zoo  ## run the slow tests too
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

zoo: .venv/.zoo  ## resize the networks of torchvision and timm, write docs/coverage.md
	$(BIN)/python -m tests.zoo.coverage

speed: .venv/.zoo .venv/.bench  ## time tracing and surgery beside Torch-Pruning, write results/speed.json
	$(BIN)/python -m tests.zoo.speed

docs: .venv/.docs  ## build the site of docs/ into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: .venv/.dev  ## look for mistakes and for unformatted files, change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/.dev  ## format all files, repair what can be repaired
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

types: .venv/.dev  ## check the types of src
	$(BIN)/mypy

check: lint types test  ## everything that must pass before a commit

clean:  ## remove the environment and all caches; runs/ stays
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' Makefile | expand -t 12

# The environment is built anew when what it should hold has changed.
.venv/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "autowidth needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv --clear .venv
	$(PIP) --editable '.[lab]'
	touch $@

.venv/.dev: .venv/.runtime
	$(PIP) --editable '.[dev]'
	touch $@

.venv/.zoo: .venv/.runtime
	$(PIP) --editable '.[zoo]'
	touch $@

.venv/.bench: .venv/.runtime
	$(PIP) --editable '.[bench]'
	touch $@

.venv/.docs: .venv/.runtime
	$(PIP) --editable '.[docs]'
	touch $@
