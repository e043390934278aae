# `make demo` and `make test` work in a fresh clone: they make .venv and install into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
REPORT ?= validation_output
NAME ?= default
VALIDATE ?=
INSTALLED := $(VENV)/.installed

.PHONY: help demo validate report test test-slow defects lint format typecheck build clean

help:
	@echo "make demo       three simulations with the bundled student, and a report (5 minutes)"
	@echo "make validate   is the bundled student fit for dynamics? The short form (minutes); VALIDATE=... adds options"
	@echo "make report     puts the finished validation in the folder REPORT into docs/reports, under NAME (default)"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make defects    injects nine defects and counts how many the tests catch"
	@echo "make lint       ruff"
	@echo "make typecheck  mypy, on the package as a wheel has it"
	@echo "make format     ruff, changing files"
	@echo "make build      wheel and sdist in dist/"
	@echo "make clean      removes what the others made, .venv included"

$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/01_demo.py --output demo_output

validate: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/mlffd validate default -o $(REPORT) $(VALIDATE)

report:
	mkdir -p docs/reports
	cp $(REPORT)/report.html docs/reports/$(NAME).html
	cp $(REPORT)/model_card.md docs/reports/$(NAME).md

# one thread a process: two of them share the cores
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

defects: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/inject_defects.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# a lenient editable install hides kernels/ and training/ from type checkers
typecheck: $(INSTALLED)
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/typecheck .
	cd build && MYPYPATH=typecheck $(BIN)/mypy --config-file ../pyproject.toml -p openmm_mlffd

build: $(INSTALLED)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist demo_output validation_output *.egg-info .pytest_cache .mypy_cache .ruff_cache
