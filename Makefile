# `make help` lists what can be asked for. Everything is installed into .venv, once, with the versions of constraints.txt.

PYTHON ?= python3
OUT    ?= runs/demo
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := federated,server,offline,simulate,encrypted,serve,web,mcp,langchain,llamaindex,dev
STAMP  := $(VENV)/.installed

# Nothing goes over the network after installation, and nobody is told what was run.
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo demo-full test lint format docs proto clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install everything into it (about 2 minutes, once)

demo: $(STAMP) ## from a teacher to a private, searchable federation, in 6 minutes: runs/demo
	@$(BIN)/stillroom demo --out $(OUT)

demo-full: $(STAMP) ## the same on the whole corpus, for the figures of record (about 30 minutes): runs/full
	@$(BIN)/stillroom demo --out runs/full --scale full

test: lint ## every check and every test
	@echo "pytest"
	@$(BIN)/python -m pytest -q

lint: $(STAMP) ## ruff, mypy --strict, import-linter
	@echo "ruff check"
	@$(BIN)/ruff check --quiet
	@echo "ruff format"
	@$(BIN)/ruff format --check --quiet || { echo "error: files above are not formatted: make format" >&2; exit 1; }
	@echo "mypy --strict"
	@$(BIN)/mypy --no-error-summary
	@echo "lint-imports"
	@$(BIN)/lint-imports --no-logo > $(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log >&2; exit 1; }

format: $(STAMP) ## put the code into the house format
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

docs: $(STAMP) ## write again the pages that are generated from the code
	@$(BIN)/python -m stillroom_shared.settings > $(VENV)/settings.md
	@mv $(VENV)/settings.md docs/settings.md
	@$(BIN)/python -m stillroom_server.distillery.recipe > $(VENV)/recipe-settings.md
	@mv $(VENV)/recipe-settings.md docs/recipe-settings.md
	@$(BIN)/python -m stillroom_simulations.figures README.md docs/figures.md

proto: $(STAMP) ## generate the messages of retrieval.proto again
	@cd client && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. stillroom_client/serving/retrieval.proto

clean: ## remove everything that make created: .venv, runs, caches of the tools
	@rm -rf $(VENV) runs build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp, because a virtual environment's own date says nothing about what is in it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old or missing, Stillroom needs Python 3.11 or later: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (about 2 minutes, once)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot create a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt || \
	  { echo "error: installation failed, see above; after a change of network or index: make clean, then again" >&2; exit 1; }
	@touch $(STAMP)
