# Two commands matter: `make quickstart` and `make test`. Each makes .venv, installs what it needs, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= studies/quickstart
# Another torch build: make quickstart TORCH_INDEX=<address of a package index>
TORCH_INDEX ?=
# Processes of the tests; a file of tests stays in one
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: quickstart test test-fast kill-matrix lint format clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "carft-ray needs Python 3.11 or newer; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing carft-ray into $(VENV): about 1.5 GB of packages with a CPU build of torch (more with CUDA), a few minutes."
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(if $(TORCH_INDEX),$(PIP) install torch torchvision --index-url $(TORCH_INDEX))
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install --group dev
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/carft-ray search search_spaces/quickstart.yaml --study $(STUDY)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

# ten kills of one study, five of a confirm and ten others over a real Ray, and four long searches of all fates:
# some 35 minutes on two cores
kill-matrix: $(VENV)/.installed-dev
	@PYTHONPATH=. $(BIN)/python tests/kill_matrix.py

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
