# Needs python3 (3.11 or newer), git and make; everything else is installed into .venv here.
PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/.stamps

# Two threads are enough for sage-tiny, and leave a shared machine usable.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup run test lint format bench clean

setup: $(STAMPS)/test $(STAMPS)/lint

# A group of packages is installed when it is first needed, and again when the pins have changed.
# Bytecode is left to the first import: compiling all of torch and transformers takes longer than
# what is saved.
$(STAMPS)/%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt \
		--editable '.$(if $(filter-out run,$*),[$*])'
	@mkdir -p $(@D) && touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sagellm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

run: $(STAMPS)/run
	$(BIN)/sagellm run graphs/pd.yaml --chat --prompt "What is 23 + 45?"

test: $(STAMPS)/test
	$(BIN)/pytest

lint: $(STAMPS)/test $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)/test
	$(BIN)/sagellm bench engine

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
