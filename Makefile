# Two commands matter: `make quickstart` and `make test`. Each makes .venv, installs what it needs, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= studies/quickstart
# Another torch build: make quickstart TORCH_INDEX=<address of a package index>
TORCH_INDEX ?=
# Processes of the tests, one more than cores: they wait a third of the time; a file of tests stays in one
JOBS ?= 3
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# pytest keeps its rewritten assertions, and interpreters that tests start what they compile: 10 s for each process
export PYTHONDONTWRITEBYTECODE :=

OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip --disable-pip-version-check -q
# a search of seconds, to see that its parts work together
SHORT := --set search.trials=2 --set train.epochs=1 --set search.baselines={} --set data.id_val.num_per_class=20

.PHONY: quickstart test test-whole test-all test-fast test-nodes test-oldest coverage kill-matrix crash-points cluster-story fuzz lint format tables notebook docs clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "carft-ray needs Python 3.11 or newer; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml carft_ray/__init__.py | $(BIN)/python
	@echo "Installing carft-ray into $(VENV): about 1.5 GB of packages with a CPU build of torch (more with CUDA), a few minutes."
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(if $(TORCH_INDEX),$(PIP) install torch torchvision --index-url $(TORCH_INDEX))
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install --group dev
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) install --group docs
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/carft-ray search search_spaces/quickstart.yaml --study $(STUDY)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not whole and not nodes'

# the tests marked `whole`, which `make test` leaves out
test-whole: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'whole and not nodes'

test-all: test test-whole

# make test, and which share of the lines and branches of each package it runs; not those of Ray's workers
coverage: $(VENV)/.installed-dev
	@mkdir -p build
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not whole and not nodes' \
		--cov=carft_ray --cov-branch --cov-report=json:build/coverage.json
	@$(BIN)/python tests/coverage_table.py build/coverage.json

# clusters of real nodes on this machine: submitted searches, nodes that come, go and are drained, Slurm by stand-ins
test-nodes: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m nodes

test-fast: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not whole and not nodes'

# the lower bounds of pyproject.toml, in an environment of their own: the fast tests, exports, a search with
# each executor; minutes, and some 8 GB of packages where torch is one for CUDA
$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/constraints.txt
	@echo "Installing the oldest releases that pyproject.toml allows into $(OLDEST), a few minutes."
	@$(OLDEST_PIP) install --upgrade 'pip>=25.1'
	@$(if $(TORCH_INDEX),$(OLDEST_PIP) install -c $(OLDEST)/constraints.txt torch torchvision --index-url $(TORCH_INDEX))
	@$(OLDEST_PIP) install -c $(OLDEST)/constraints.txt -e '.[dashboard,hf,onnx]' --group dev
	@touch $@

test-oldest: $(OLDEST)/.installed
	@$(OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not whole and not nodes'
	@$(OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE) tests/test_export.py
	@rm -rf $(OLDEST)/tried
	@for way in inline ray-train; do \
		$(OLDEST)/bin/carft-ray search search_spaces/quickstart.yaml --executor $$way $(SHORT) \
			--study $(OLDEST)/tried/$$way || exit 1; \
	done

# searches with eight trainings at a time over a real Ray, of which one thing is killed again and again: WHAT=driver, trial,
# rank, node, mailbox or bucket (all by default); minutes each on two cores
WHAT ?=
kill-matrix: $(VENV)/.installed-dev
	@PYTHONPATH=. $(BIN)/python tests/kill_matrix.py $(WHAT)

# all kills of a training, of searches and of a confirm, around every write; `make test` makes others of them every day.
# Some 25 minutes, of which 20 starts with Ray take half; WHERE=bucket: around every write to a bucket, also a failing one
WHERE ?= folder
crash-points: $(VENV)/.installed-dev
	@KILLS_OF=1 $(BIN)/python -m pytest -s tests/test_study_crash.py -k $(WHERE)
	@KILLS_OF=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/test_crash.py tests/test_test_struck.py
	@KILLS_OF=1 $(BIN)/python -m pytest -s tests/test_confirm_struck.py tests/test_soup_model.py -k 'killed and $(WHERE)'

# a search on a cluster of real nodes: one is killed, one joins, one is drained, the head dies and comes back; inline and
# ray-train, some 10 minutes
cluster-story: $(VENV)/.installed-dev
	@for way in inline ray-train; do \
		rm -rf $(VENV)/story-$$way; \
		PYTHONPATH=. $(BIN)/python tests/cluster_story.py $(VENV)/story-$$way $$way || exit 1; \
	done

# inputs of strangers, damaged at random, through doctor, a search and report; on JOBS processes
CASES ?= 10000
SEED ?= 0
fuzz: $(VENV)/.installed-dev
	@$(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED) --lanes $(JOBS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python docs/keys.py --check

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# the generated parts of docs/recipe_*.md, docs/resume.md and docs/commands.md, and the JSON schema of a recipe
tables: $(VENV)/.installed
	@$(BIN)/python docs/keys.py

# runs examples/quickstart.ipynb and stores its outputs in it; about two minutes
notebook: $(VENV)/.installed-dev
	@$(BIN)/python docs/notebook.py

# the documents as a site: open build/site/index.html
docs: $(VENV)/.installed-docs
	@$(BIN)/python -m sphinx -E -W --keep-going -q -c docs -d build/doctrees . build/site

clean:
	rm -rf $(VENV) $(OLDEST) build .pytest_cache .mypy_cache .ruff_cache
