# Everyday verbs. `make chat` and `make test` do everything on a fresh machine with Python 3.11 or newer.
#
#   make chat                     talk to the embedded model (set-up included)
#   make chat PROMPT="..."        one answer, then exit
#   make test                     style, types, floors, tests
#   make check                    style, types and floors only
#   make fix                      format and repair what can be repaired
#   make bench                    speed on this machine, written to benchmarks/results.md
#   make gpu-test                 tests that need a CUDA device; then: make gpu-bench (speed of the GPU kernels)
#   make nano DATA=../shared/data rebuild the embedded model from its texts

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
PROMPT ?=
DATA   ?= ../shared/data

export PYTHONWARNINGS ?=

.PHONY: chat test check fix bench gpu-test gpu-bench nano clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,10s/^#  //p' Makefile

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "herd needs Python 3.11 or newer; say which one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "Installing herd (torch is the large part: a minute or two) ..."
	@$(PIP) -e .
	@touch $@

# Not after .run: pip would build the kernels a second time.
$(VENV)/.test: $(VENV)/.python pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "Installing herd and what the tests compare against (torch is the large part: some minutes) ..."
	@$(PIP) -e '.[test,dev,train,data,plot]'
	@touch $(VENV)/.run $@

# $(value ...) and the quoting keep quotes, backticks and dollar signs of a prompt out of the shell's hands.
chat: $(VENV)/.run
	@$(BIN)/herd $(if $(value PROMPT),run nano -- '$(subst ','\'',$(value PROMPT))' </dev/null,chat)

check: $(VENV)/.test
	$(BIN)/ruff format --check herd tests benchmarks
	$(BIN)/ruff check herd tests benchmarks
	$(BIN)/lint-imports --no-cache
	$(BIN)/basedpyright herd

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

fix: $(VENV)/.test
	$(BIN)/ruff format herd tests benchmarks
	$(BIN)/ruff check --fix herd tests benchmarks

bench: $(VENV)/.test
	$(BIN)/python benchmarks/engine.py
	$(BIN)/herd bench tokenizer

gpu-test: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

gpu-bench: $(VENV)/.run
	$(BIN)/python benchmarks/gpu.py

nano: $(VENV)/.test
	$(BIN)/python -m herd.train.recipes.nano --data $(DATA) --out runs/nano

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
