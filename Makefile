# Everything a newcomer or CI runs. Needs only a Python from 3.11 to 3.13 and pip; `make help` lists the targets.
#   make quickstart PYTHON=/usr/bin/python3.12      another interpreter
#   make test VENV=.venv312                         another environment

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
# Any of "dev parity harness eval judge sentiment serve tensorboard wandb tpu cuda", for `make test`; parity is PyTorch and PEFT, to
# compare against, harness is lm-eval, which asks launch.serve.
EXTRAS ?= dev,parity,harness
ASSETS ?= smollm2-135m-instruct gemma-3-270m alpaca_en_demo identity identity_en dpo_en_demo v1_sft_demo \
          glaive_toolcall_en_demo reason_tool_use_demo_50 wiki_demo c4_demo \
          ifeval nltk_punkt_tab gsm8k_100 openbookqa commonsenseqa \
          kto_en_demo factual_summary_pairs vader_movie_reviews vader_movie_pairs movie_openings imdb_sentiment
# Tests run in so many processes; "0" = in one, where a debugger works.
JOBS ?= 2
PYTEST_ARGS ?=

# The first interpreter that really runs (a pyenv shim may not), has a version in WANT, and can make an environment.
WANT ?= 3.11 3.12 3.13
FIND_PYTHON = for want in $(WANT); do \
    for python in python$$want python3 python \
        $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$want.*/bin/python3 /opt/homebrew/bin/python$$want; do \
      if "$$python" -c 'import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' $$want \
          >/dev/null 2>&1 </dev/null; then echo "$$python"; exit 0; fi; \
    done; done; \
    echo "error: no Python of version $(WANT) that can make environments was found; install one (on Debian with" \
         "its -venv package) or name it: make PYTHON=/path/to/python3" >&2; exit 2
PYTHON ?= $(shell $(FIND_PYTHON))

BIN := $(VENV)/bin
PY := $(BIN)/python
INPUTS := setup.py $(wildcard constraints/*.txt)
PRODUCT := $(VENV)/.installed
DEV := $(VENV)/.installed-$(subst $() ,,$(subst $(strip ,),-,$(EXTRAS)))
# worksteal gives an idle process the rest of the other's tests. Tests marked alone run one at a time: they start and kill
# processes, wait for signals, and would time each other out.
PARALLEL = COMPILE=fast $(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
# What `make test` runs: neither contracts (slow) nor what takes minutes (heavy).
TESTS ?= not slow and not heavy
CHECKED := posttrain_jax launch configs experiments tests setup.py

# pip is silent unless something fails: the resolver has nothing to decide, every version is pinned.
define PIP_INSTALL
	@version=$$($(PY) -c 'import sys; print("%d%d" % sys.version_info[:2])'); \
	  echo "Installing $(1) into $(VENV) ($(2); silent until it is done) ..."; \
	  $(PY) -m pip install -qq --disable-pip-version-check -c constraints/py$$version.txt -e '$(1)' </dev/null
endef

.PHONY: help quickstart install install-dev assets test test-contracts test-slow lint format types bench pins python clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

quickstart: install  ## Teach a real 135M model its name on this machine, under 8 minutes (NAME=Ada: another name)
	@GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} $(PY) -m launch.quickstart \
	  $(if $(findstring command,$(origin NAME)),--name='$(NAME)')

install: $(PRODUCT)  ## Make .venv with what training needs

install-dev: $(DEV)  ## The same, with tests, ruff, mypy and PyTorch (to compare against)

assets: $(PRODUCT)  ## Fetch the demo models and data into the cache (about 400 MB, once)
	@$(PY) -m launch.fetch $(ASSETS) >/dev/null

test: $(DEV)  ## The tests that take seconds each, on 8 virtual CPU devices
	@$(MAKE) assets
	@$(PARALLEL) -m "$(TESTS)"

test-contracts: $(DEV)  ## What takes longer: real models, whole runs, several processes, kills
	@$(MAKE) assets
	@$(PARALLEL) -m "slow and not heavy and not alone"
	@COMPILE=fast $(PY) -m pytest -m "slow and not heavy and alone" $(PYTEST_ARGS)

test-slow: $(DEV)  ## What takes minutes a test and is not part of .ci/run: optima over seeds, soaks
	@$(MAKE) assets
	@$(PY) -m pytest -m heavy $(PYTEST_ARGS)

lint: $(DEV)  ## ruff: rules and format, nothing is changed
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)

format: $(DEV)  ## ruff: fix and format
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

types: $(DEV)  ## mypy
	@$(BIN)/mypy

bench: install  ## Speed and memory beside TRL and a plain PyTorch loop (own environment; a quiet machine, 20 min)
	@$(PY) -m experiments.bench.sft

pins:  ## Resolve everything afresh and write constraints/pyXY.txt for PYTHON
	@rm -rf .venv-pins && "$(PYTHON)" -m venv .venv-pins
	@.venv-pins/bin/python -m pip install -qq -e '.[dev,parity,harness]'
	@version=$$(.venv-pins/bin/python -c 'import sys; print("%d%d" % sys.version_info[:2])'); \
	  { echo "# What CI installs on Python 3.$${version#3}: every package, exactly. Made by 'make pins'."; \
	    .venv-pins/bin/python -m pip freeze --exclude-editable | sed -E 's/^([^=]+==[^+]+)\+.*/\1/' \
	      | grep -v -E '^(nvidia-|cuda-|triton==|setuptools==)'; } > constraints/py$$version.txt
	@rm -rf .venv-pins

python:  ## Which interpreter would be used (WANT="3.12" asks for a version)
	@$(FIND_PYTHON)

clean:  ## Remove environments and caches of this checkout (not the asset cache)
	rm -rf $(VENV) .venv-* .pytest_cache .hypothesis .mypy_cache .ruff_cache build posttrain_jax.egg-info experiments/bench/.venv-*
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(PY):
	@test -n "$(PYTHON)" || { $(FIND_PYTHON); }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version) ..."
	@"$(PYTHON)" -m venv $(VENV)

$(PRODUCT): $(INPUTS) | $(PY)
	$(call PIP_INSTALL,.,1.3 GB on disk, about a minute)
	@touch $@

$(DEV): $(INPUTS) | $(PY)
	$(call PIP_INSTALL,.[$(EXTRAS)],up to 2.3 GB on disk, about 2 minutes)
	@touch $(PRODUCT) $@
