# `make course` builds everything a reader, a student or an instructor needs; `make test` checks it.
# A CUDA or CPU build of torch: TORCH_INDEX=<index with that build>. Another Python: PYTHON=python3.12.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
export TORCH_INDEX
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help course test test-all setup model labs book release class proof lint lock clean

help:
	@echo "make course    set up, get the model, build labs and book, grade an example class"
	@echo "make test      set up and run the tests (a sample of the mutants)"
	@echo "make test-all  the same with every mutant of every lab"
	@echo "make lint      ruff and mypy"
	@echo "make lock      resolve requirements.lock again"
	@echo "make clean     remove what was generated (students' work in labs/ stays)"

setup:
	@$(PYTHON) tools/bootstrap.py

course: setup
	@$(BIN)/python tools/course.py

model labs book release class: setup
	@$(BIN)/python tools/course.py $@

test: setup
	@$(BIN)/python tools/course.py model labs release book
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

test-all: setup
	@$(BIN)/python tools/course.py model labs release book
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --all-mutants $(PYTEST_ARGS)

proof: setup
	@$(BIN)/llmlab labs verify

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock: setup
	@$(BIN)/python tools/lock.py

clean:
	rm -rf _build labs/build .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
