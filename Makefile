# `make demo` and `make test` set everything up by themselves on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-slow lint bench clean

demo: $(STAMP)
	$(BIN)/memfit demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every figure of the README and the docs; results go to benchmarks/results. Hours on two cores: give the machine to it.
bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/low_rank_gradient.py
	$(BIN)/python benchmarks/largest_model.py
	$(BIN)/python benchmarks/language_model.py --text $${MEMFIT_DATA:-../shared/data}/tinyshakespeare.txt
	$(BIN)/python benchmarks/bases.py --text $${MEMFIT_DATA:-../shared/data}/tinyshakespeare.txt
	$(BIN)/python benchmarks/lstm_recognizer.py
	$(BIN)/python benchmarks/personalization.py --recordings $${MEMFIT_DATA:-../shared/data}/fsdd
	$(BIN)/python benchmarks/ledger_vs_process.py
	$(BIN)/python benchmarks/ledger_overhead.py
	$(BIN)/python benchmarks/kill_and_resume.py
	$(BIN)/python benchmarks/gradient_filter_layers.py
	$(BIN)/python benchmarks/gradient_filter_finetune.py --data $${MEMFIT_DATA:-../shared/data}/cifar10-subset.npz --work $(VENV)/pretrained
	$(BIN)/python benchmarks/nvm.py --data $${MEMFIT_DATA:-../shared/data}/mnist.npz

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[speech,vision,nvm,demo,hf,png,dev]'
	touch $@

# The peers' packages besides, which nothing but the benchmarks needs.
$(BENCH_STAMP): $(STAMP)
	$(INSTALL) '.[speech,vision,demo,png,native,dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
