# make demo   set everything up and run one method's study in its quick form
# make test   set everything up and run lint, type check, import rules and tests
# PYTHON=/path/to/python3.11 chooses the Python.

BIN := .venv/bin
SOURCES := src tests benchmarks recipes
export OMP_NUM_THREADS ?= 1
export PYTHON

.PHONY: help demo test lint bench verify pretrained

help:
	@echo "make demo        run the study of the monotone deep Boltzmann machine, one to two minutes"
	@echo "make test        lint, type check, import rules and tests"
	@echo "make lint        the first three of these"
	@echo "make bench       the side-by-side benchmarks with other libraries"
	@echo "make verify      run every study in full and compare with the recorded results"
	@echo "make pretrained  train the networks that ship in the package"

demo:
	@tools/setup
	$(BIN)/paperback run monotone-dbm

test: lint
	$(BIN)/pytest --numprocesses 2

lint:
	@tools/setup dev,llm,bayes,explain,optuna,ray
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench:
	@tools/setup dev,llm,bayes,explain,optuna,ray,peers
	@for pins in benchmarks/*/peers.txt; do tools/setup-peers $$(basename $$(dirname $$pins)) || exit 1; done
	@for script in $$(find benchmarks -name '*.py' -not -path '*/peers/*' | sort); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

verify:
	@tools/setup
	$(BIN)/paperback verify

pretrained:
	@tools/setup
	@found=$$(find recipes -name '*.py' | sort); \
	if [ -z "$$found" ]; then echo "No network ships yet, so there is none to train; a recipe in recipes/ is run by this command."; fi; \
	for script in $$found; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
