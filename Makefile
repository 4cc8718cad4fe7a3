# emo2_mm: `make help` lists the targets.

# Looked up on first use, so that `make help` and `make clean` start at once.
STACK ?= $(eval STACK := $(shell PYTHON='$(PYTHON)' GPU='$(GPU)' scripts/setup_env.sh --stack))$(STACK)
VENV = .venv$(patsubst %,-%,$(filter-out classic,$(STACK)))
# The environment's programs first, for pre-commit and for what tests start.
IN_VENV = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env demo demo-all lint test test-all test-export docs format clean

help:
	@echo 'make env       set up .venv or .venv-onedl, which all other targets use; finished steps are skipped'
	@echo 'make demo      train a digit detector on this machine, evaluate and draw it: work_dirs/demo'
	@echo 'make demo-all  train every method briefly from its real config: work_dirs/demo/all'
	@echo 'make test      lint and the fast tests; with SLOW=1, or make test-all, the slow ones, too'
	@echo 'make test-export  the tests of exported models in every format whose packages are there; says which are not'
	@echo 'make lint      ruff, codespell, mypy (through pre-commit)'
	@echo 'make docs      build the documentation site: site/'
	@echo 'make format    apply ruff fixes and formatting'
	@echo 'make clean     remove environments (of STACK, if given), caches and build products; keep data and results'
	@echo
	@echo 'Variables: STACK=classic or onedl (default: by GPU and Python), PYTHON=path of a Python 3.8 - 3.12,'
	@echo '           GPU=0 to ignore the GPU, JOBS=$(JOBS) test processes, ARGS=more arguments for pytest or the demos'

env:
	@STACK='$(STACK)' PYTHON='$(PYTHON)' GPU='$(GPU)' scripts/setup_env.sh

demo: env
	@$(IN_VENV) python tools/demo/run.py $(ARGS)

demo-all: env
	@$(IN_VENV) python tools/demo/run.py --all $(ARGS)

# pre-commit works on what git tracks; a source archive has no git.
lint: env
	@export $(IN_VENV); if [ -e .git ]; then pre-commit run --all-files; \
	else ruff check && ruff format --check && codespell && mypy; fi

test: lint
	@$(IN_VENV) python -m pytest -n $(JOBS) $(if $(SLOW),,-m 'not slow') $(ARGS)
	@echo "make test: lint is clean, all $(if $(SLOW),,fast )tests pass."

test-all: SLOW = 1
test-all: test

test-export: env
	@$(IN_VENV) python -m pytest -n $(JOBS) -rs tests/export $(ARGS)

docs: env
	@$(IN_VENV) mkdocs build --strict $(ARGS)

format: env
	@export $(IN_VENV); ruff check --fix; ruff format

clean:
	rm -rf $(if $(filter undefined file,$(origin STACK)),.venv .venv-onedl,$(VENV)) build dist site *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
