# Makefile: what can be done here. It works in the active environment (venv or conda), else in .venv.
# make demo ARGS="--data mnist"   make test PYTEST_ARGS="-k record"   make gpu OUT=folder PARTS="build test"

ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
CONFIG := $(if $(VIRTUAL_ENV)$(CONDA_PREFIX),$(wildcard $(ENV)/pyvenv.cfg),$(ENV)/pyvenv.cfg)
PYTHON := $(ENV)/bin/python
PARTS ?=
# Those of environments with other Pythons and torches, for `make reliability`.
PYTHONS ?=
# pip's arguments, used only where no torch of 2.11 or later is.
TORCH ?= torch==2.13.0
FASTRES_BUILD ?= require
export FASTRES_BUILD

# What has been done for this environment: build/make/<environment>/<what>.
DONE := build/make$(ENV)
NATIVE := $(DONE)/native-$(FASTRES_BUILD)-$(FASTRES_CUDA)-$(FASTRES_CUDA_ARCHS)
SOURCES := $(wildcard csrc/*.cpp csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help demo test build lint types fuzz sanitize reliability wheel bench tables gpu clean again
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/make \1	\2/p' Makefile

demo: $(DONE)/demo $(NATIVE)  ## train residual MLPs of 6 to 300 blocks on digits, measure every block
	$(PYTHON) -m fastres demo $(ARGS)

test: $(DONE)/test $(NATIVE)  ## pass the tests
	$(PYTHON) -m pytest $(PYTEST_ARGS)

build: $(NATIVE)  ## compile the libraries, in place

lint: $(DONE)/dev  ## ruff, clang-format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(ENV)/bin/clang-format --dry-run --Werror $(SOURCES)

types: $(DONE)/dev  ## mypy, strict
	$(PYTHON) -m mypy

fuzz: $(DONE)/test $(NATIVE)  ## call operators 2,000 times, kill runs 200 times, damage 500 files
	FASTRES_KILLS=200 FASTRES_DAMAGES=500 $(PYTHON) -m pytest tests/test_fuzz.py \
	  tests/test_survival.py tests/test_damage.py --hypothesis-profile=nightly $(PYTEST_ARGS)

reliability: $(DONE)/test $(NATIVE)  ## PARTS="fuzz kills": run them all night, into docs/reliability
	$(PYTHON) tools/reliability.py $(addprefix --python ,$(PYTHONS)) $(PARTS)

sanitize: $(DONE)/test $(NATIVE)  ## call the CPU library under ASan, UBSan and TSan; look for leaks
	cd tests && $(PYTHON) -m sanitizing.build address thread
	FASTRES_CALLS=10000 $(PYTHON) -m pytest tests/test_leaks.py --timeout=3600 $(PYTEST_ARGS)

wheel: $(DONE)/build  ## build a wheel for this Python, with the libraries, into dist
	$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

bench: $(DONE)/test $(NATIVE)  ## measure on this CPU, into benchmarks/results
	$(PYTHON) -m benchmarks $(ARGS)

tables: $(DONE)/test  ## write the tables of README and docs from benchmarks/results
	$(PYTHON) -m benchmarks.tables

gpu:  ## OUT=folder: build, test, sanitize and measure on an NVIDIA GPU; needs no network
	@test -n "$(OUT)" || { echo 'make gpu: OUT must name a folder for what it produces'; exit 2; }
	$(or $(wildcard $(PYTHON)),python3) tools/gpu.py --out $(OUT) $(PARTS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info fastres/_C*.so

# What setup.py needs, or the extra of pyproject.toml that the file is named after.
$(DONE)/%: pyproject.toml tools/environment.py $(CONFIG)
	$(PYTHON) tools/environment.py --torch '$(TORCH)' $*
	@mkdir -p $(@D) && touch $@

# The libraries, in place. Without one there is nothing to be up to date.
$(NATIVE): setup.py pyproject.toml $(SOURCES) $(if $(wildcard fastres/_C.*so),,again) | $(DONE)/build
	$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@

$(CURDIR)/.venv/pyvenv.cfg:
	@for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo $$python -m venv .venv; exec $$python -m venv .venv; fi; done; \
	echo 'fastres: Python 3.11 or later must be on PATH' >&2; exit 1
