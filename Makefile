# `make demo` and `make test` set up everything they need in .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean
demo: $(VENV)/.ready
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskcompile needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@command -v c++ g++ clang++ >/dev/null || { echo "torch.compile needs a C++ compiler: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade pip
	$(BIN)/pip install --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
