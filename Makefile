# Works in a fresh clone: every target first builds what it needs of .venv, with `python3` or the interpreter named by
# `make PYTHON=... TARGET`. Where packages come from is pip's own configuration (pip.conf, PIP_* variables).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile pip compiles all of torch and its like; what is imported is compiled then.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help demo app test lint style docs notebooks

help:
	@echo "make demo       draw demo.png with the small model inside the package"
	@echo "make app        a web page to draw in, with the same model"
	@echo "make test       run the fast tests"
	@echo "make lint       check style (ruff) and types (mypy)"
	@echo "make style      mend what ruff can mend"
	@echo "make docs       build the documentation into site/"
	@echo "make notebooks  run the notebooks in examples/ and store what they print"

demo: $(VENV)/.package
	$(BIN)/hack-pipelines demo --output demo.png

app: $(VENV)/.test
	$(BIN)/hack-pipelines app

# One process a core. The tests of a file stay together, since they share what is costly to make, and files come in their
# order: by default those with few tests, some of them long, would come last and leave all processes but one idle.
test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# The variable silences a notice of the theme about a MkDocs 2 that is not used here.
notebooks: $(VENV)/.test
	$(BIN)/python examples/notebooks/run.py

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each stamp marks what .venv holds by then. They form one chain, so that two installs never run side by side.

# Torch comes first and alone: a build that pip's configuration offers (CPU, CUDA, ...) is then in place when the
# package's requirements are resolved.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hack_pipelines needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH), the largest download"
	@$(PIP_INSTALL) $(TORCH)
	@touch $@

$(VENV)/.package: $(VENV)/.torch setup.cfg pyproject.toml
	@echo "Installing hack_pipelines"
	@$(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.package
	@echo "Installing what the tests need"
	@$(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "Installing ruff, mypy and build"
	@$(PIP_INSTALL) -c constraints.txt -e '.[test,dev]'
	@touch $@
