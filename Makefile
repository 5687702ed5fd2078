# Every target sets up .venv in this folder by itself; nothing else is needed than make and Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-isa test-all lint mutants sentinel clean

demo: .venv/.installed
	JAX_PLATFORMS=cpu $(BIN)/glm-jax run configs/demo.py

# a file of tests stays in one process, which compiles what its tests share once
test: lint
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

# a sample of the numerical tests with fewer vector instructions, and with another number of XLA's threads (NPROC; at
# least two for each of the eight devices, whose collectives would wait for each other)
test-isa: .venv/.installed
	XLA_FLAGS=--xla_cpu_max_isa=AVX2 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile -m "isa and not slow"
	XLA_FLAGS=--xla_cpu_max_isa=SSE4_2 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile -m "isa and not slow"
	NPROC=64 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile -m "isa and not slow"

# the last -m wins: the empty one selects the tests marked slow too
test-all: lint
	$(BIN)/pytest -m ""

lint: .venv/.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# hours the first time; later only what has changed. Afterwards single modules: python -m tests.mutation rlhf/kl
mutants: .venv/.installed
	$(BIN)/python -m tests.mutation

# the TPU compiler lies in a folder of its own: where it is installed, JAX looks for TPUs
sentinel: .venv/.installed .libtpu/.installed
	JAX_PLATFORMS=cpu PYTHONPATH=.libtpu $(BIN)/python benchmarks/sentinel.py

.libtpu/.installed: pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .libtpu "libtpu==0.0.42"
	touch $@

# installed again only when the dependencies change
.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glm-jax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[demo,dev]"
	touch $@

clean:
	rm -rf .venv .libtpu .mutants build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
