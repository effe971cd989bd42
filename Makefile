# `make demo` and `make test` are all that a fresh machine needs: each makes the environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-full check format clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo       pretraining, SFT, DPO and RLVR of a small model on built-in data; a CPU is enough"
	@echo "make test       the tests (minutes)"
	@echo "make test-full  the tests and the slow ones: kills, long runs"
	@echo "make check      ruff: format and lint"
	@echo "make clean      remove runs and caches (the environment stays; make clean-venv removes it)"

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-eval.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto

test-full: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto -m "not gpu"

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV)
