# On a machine with nothing but Python >= 3.10, pip and make:
#
#   make demo   merge a small pair of checkpoints with the stock mergekit-yaml command
#   make test   run all tests
#   make test-lowest   the same with the lowest versions of everything that pyproject.toml allows
#   make lint   ruff and mypy
#   make docs   write docs/cli.md anew
#   make site   the documentation as a website, into site/
#   make dist   wheel and source distribution into dist/, checked as PyPI does
#   make bench  all benchmarks, some twenty minutes, into benchmarks/RESULTS.md
#   make study  the robustness study, up to an hour, into benchmarks/robustness/RESULTS.md
#   make study-short  the same in minutes, below .study/: a check that it runs
#   make study-real   what an edit is worth on a real model, up to four hours, goes on where it was
#   make study-real-short  the same in minutes: a check that it runs
#
# Each creates the virtual environment .venv on first use. Another interpreter:
#   make test PYTHON=python3.12

PYTHON ?= $(shell command -v python3 2>/dev/null || command -v python 2>/dev/null)
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest lint format docs site dist bench study study-short study-real study-real-short clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,17p'

demo: $(VENV)/.test
	$(BIN)/python examples/demo.py

# One thread a worker: the models of the tests are tiny, and threads of several workers only fight. One worker
# more than there are cores: some tests wait for a connection that is lost on purpose.
test: $(VENV)/.test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup

# pip has no such resolution; uv has, and fetches torch with its CUDA libraries, some 3 GB.
test-lowest: $(VENV)/.test
	$(PIP) uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct -e '.[test]'
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(VENV)-lowest/bin:$$PATH" $(VENV)-lowest/bin/python -m pytest -n logical --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test
	$(BIN)/python docs/build_cli.py

# Fails on a link or an anchor that leads nowhere. The variable silences a notice about another project.
site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# One after the other: they share the machine with nothing, least of all with each other.
bench: $(VENV)/.test
	for name in spectral memory merge growth floor projector kernels scale tune adapter_file extract; do \
		$(BIN)/python benchmarks/$$name.py $(BENCH) --json benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/results.py

# Goes on where an interrupted run stopped; `make study STUDY='--jobs 4'` for more workers.
study: $(VENV)/.test
	$(BIN)/python -m benchmarks.robustness $(STUDY)

study-short: $(VENV)/.test
	$(BIN)/python -m benchmarks.robustness --short $(STUDY)

# Goes on with the pieces that have no result; needs apt-get and dpkg-deb for its text.
study-real: $(VENV)/.test
	$(PIP) -e '.[study-real]'
	$(BIN)/python -m benchmarks.real_models $(STUDY)

study-real-short: $(VENV)/.test
	$(PIP) -e '.[study-real]'
	$(BIN)/python -m benchmarks.real_models --short $(STUDY)

clean:
	rm -rf $(VENV) $(VENV)-lowest .demo .study site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an installation is repeated only when what it depends on has changed.
$(VENV)/.test: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.test

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e '.[docs]'
	@touch $@

# Some Linux distributions ship venv without ensurepip; pip can then equip the environment from outside.
$(VENV)/.python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV) >/dev/null 2>&1 || { \
		"$(PYTHON)" -m venv --clear --without-pip $(VENV) && \
		"$(PYTHON)" -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@
