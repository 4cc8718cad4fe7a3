# emo2_mm: `make help` lists what can be made.

ifndef STACK
STACK := $(shell PYTHON='$(PYTHON)' tools/make_env.sh --stack)
endif
export STACK PYTHON GPU

STACKS := $(filter-out dev,$(patsubst requirements/%.txt,%,$(wildcard requirements/*.txt)))
ifneq ($(filter-out $(STACKS),$(STACK))$(words $(STACK)),1)
$(error unknown STACK=$(STACK); known stacks: $(STACKS))
endif

VENV := .venv$(patsubst %,-%,$(filter-out classic,$(STACK)))
BIN := $(CURDIR)/$(VENV)/bin
# The tools of the environment first, for pre-commit and whatever is started by a test.
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help env demo demo-all test test-all lint format clean

help:
	@echo 'make env       set up $(VENV), the environment of all the others (steps done before are skipped)'
	@echo 'make demo      train a digit detector on this machine, evaluate and draw it: work_dirs/demo'
	@echo 'make demo-all  train every method briefly from its real config: work_dirs/demo/all'
	@echo 'make test      lint and the fast tests; with SLOW=1, or make test-all, the slow ones, too'
	@echo 'make lint      ruff, codespell (through pre-commit)'
	@echo 'make format    let ruff mend what it can'
	@echo 'make clean     remove $(VENV), caches and build products; data and results stay'
	@echo
	@echo 'Variables: STACK=$(STACK) (known: $(STACKS)), PYTHON=path of a Python 3.8 - 3.12, GPU=0 to do without one,'
	@echo '           JOBS=$(JOBS) test processes, ARGS=more arguments for pytest or the demos'

env:
	@tools/make_env.sh

demo: env
	@$(BIN)/python tools/demo/run.py $(ARGS)

demo-all: env
	@$(BIN)/python tools/demo/run.py --all $(ARGS)

# pre-commit works on what git tracks; a source archive has no git.
lint: env
	@if [ -e .git ]; then pre-commit run --all-files; \
	else ruff check && ruff format --check && codespell; fi

JOBS ?= 2
test: lint
	@$(BIN)/python -m pytest -n $(JOBS) $(if $(SLOW),,-m 'not slow') $(ARGS)
	@echo "make test: lint is clean, all $(if $(SLOW),,fast )tests pass."

test-all: SLOW = 1
test-all: test

format: env
	@ruff check --fix; ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
