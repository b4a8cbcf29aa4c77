# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help setup demo test test-all check format schemas bench bench-data bench-students bench-streaming mnist clean

help:
	@echo "make demo      the main job on data that comes with a package, in under three minutes"
	@echo "make test      the default tests, in under ten minutes"
	@echo "make test-all  the slow tests too"
	@echo "make check     format, lint, types, import order, schemas"
	@echo "make bench     the benchmarks"
	@echo "make bench-data  record the real teachers that benchmarks and studies run on"
	@echo "make bench-students  students of soft targets kept in every way (half an hour of processor time)"
	@echo "make bench-streaming  reading soft targets, beside other packages (an hour of processor time)"
	@echo "make mnist     the paper's MNIST section (about an hour of processor time)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kdcache needs Python 3.11 or later; name one: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

# An object store that the tests start stands apart: its packages want other versions than kdcache's own tools.
SERVERS := .venv-servers/.ready

$(SERVERS): $(READY) tests/servers-requirements.txt
	$(BIN)/python tests/object_servers.py
	@touch $(SERVERS)

demo: $(READY)
	$(BIN)/python -m jobs.demo

test: $(READY) $(SERVERS)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(READY) $(SERVERS)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/python -m pytest tests/unit/documents -q

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schemas: $(READY)
	$(BIN)/python -m kdcache.documents schemas docs/job-file.md

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks

bench-data: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.teachers

bench-students: bench-data
	$(BIN)/python -m benchmarks.students

# Packages that streaming is compared with stand apart: some of them want other versions than kdcache's own tools.
PEERS := .venv-peers

bench-streaming: $(READY)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[plot]"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/streaming/requirements.txt
	$(PEERS)/bin/python -m benchmarks.streaming

mnist: $(READY)
	$(BIN)/python -m jobs.mnist

clean:
	rm -rf $(VENV) .venv-servers build dist
