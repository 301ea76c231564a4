# make demo   installs once, then trains, evaluates, reports: the whole product on the embedded world
# make test   the same set-up, then ruff, mypy and all tests
# make quick  the tests of less than about a second each: under two minutes on two cores
# make docs   the site, in build/docs; a warning is an error
# make newest the newest versions that pyproject allows, in an environment of their own: self-test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tiny models are many times slower with several threads a process.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test quick docs newest lint format example constraints clean

demo: $(INSTALLED)
	$(BIN)/kd-bench demo

test: $(INSTALLED) lint
	$(BIN)/pytest --numprocesses auto --dist loadscope

quick: $(INSTALLED) lint
	$(BIN)/pytest --numprocesses auto --dist loadscope -m "not slow and not browser"

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/docs/index.html"

lint: $(INSTALLED)
	$(BIN)/typos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kd-bench needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "Installing into $(VENV): about 7 GB, two to five minutes, only this once."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# What `pip install` gives a user today: no pins, no developers' tools.
newest:
	rm -rf build/newest && $(PYTHON) -m venv build/newest
	build/newest/bin/pip install --quiet --upgrade pip
	build/newest/bin/pip install --quiet ".[all]"
	build/newest/bin/kd-bench doctor --self-test

# The page in the tree, rendered again from the store in the tree; a test compares the bytes.
example: $(INSTALLED)
	$(BIN)/kd-bench report --results results/example --to reports/example

# Renew the pins from a fresh environment.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install --quiet --upgrade pip
	build/constraints/bin/pip install --quiet ".[dev]"
	build/constraints/bin/pip freeze --exclude kd-bench > constraints.txt

clean:
	-find results -mindepth 1 -maxdepth 1 ! -name README.md ! -name example -exec rm -rf {} +
	rm -rf $(VENV) build dist checkpoints .pytest_cache .mypy_cache .ruff_cache
