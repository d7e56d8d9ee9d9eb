# `make demo` and `make test` need Python 3.11 or later, make and git; each installs what it lacks into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RACERS := $(VENV)/.racers
ARGS ?=
# Tests run in two processes: those that start processes of their own, and the others.
PARALLEL ?= -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-system test-gpu lint types layers docs check race race-quick clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(STAMP)  ## install the pinned versions into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "shoal needs Python 3.11 or later; '$(PYTHON)' is not: try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,examples]'
	@touch $@

demo: $(STAMP)  ## train the example under ZeRO-3 with 2 workers
	$(BIN)/python examples/gpt.py --strategy zero3 --workers 2 $(ARGS)

test: $(STAMP)  ## everything but the tests marked system, slow or gpu
	$(BIN)/python -m pytest $(PARALLEL) -m "not system and not slow and not gpu" $(ARGS)

# pytest exits with 5 when nothing is marked so.
test-slow: $(STAMP)  ## the tests marked slow
	$(BIN)/python -m pytest -m "slow and not system and not gpu" $(ARGS) || [ $$? -eq 5 ]

test-system: $(STAMP)  ## the tests marked system: root, network namespaces or MPI
	$(BIN)/python -m pytest -m system $(ARGS) || [ $$? -eq 5 ]

test-gpu: $(STAMP)  ## the tests marked gpu, as far as there are devices for them
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMP)  ## ruff, its formatter included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyright, strict, on src
	$(BIN)/pyright

layers: $(STAMP)  ## imports point to lower layers only
	$(BIN)/lint-imports --no-cache

docs: $(STAMP)  ## the pages, in docs/_build/html
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

check: lint types layers docs  ## all that needs no test

# As root its hosts are network namespaces; without, those legs are left out.
$(RACERS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[race]'
	@touch $@

race: $(RACERS)  ## shoal beside its peers, under an hour on a machine that does nothing else
	$(BIN)/python benchmarks/race.py $(ARGS)

race-quick: $(RACERS)  ## the same with a small model, under 5 minutes
	$(BIN)/python benchmarks/race.py --quick $(ARGS)

clean:  ## remove what was built, .venv included
	rm -rf $(VENV) build dist docs/_build .pytest_cache .ruff_cache
	find src tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
