# SPDX-License-Identifier: Apache-2.0
# `make test` and `make demo` do everything from a fresh clone: environment, extension, job.
# Variables: PYTHON (which Python makes .venv), CXX, JOBS, ARGS (more words for pytest or pyfmt).

PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := .venv/bin
STAMP := .venv/.stamp
CPP = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal --benchmark-disable

.DEFAULT_GOAL := help
.PHONY: help setup build test demo demo-quick bench study lint format codegen sanitize wheel clean tools

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: build ## make .venv with everything in it, and build the extension

# Each missing tool gets a sentence, before anything is downloaded.
tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "pyfmt needs Python 3.10 or later; '$(PYTHON)' is none. Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "'$(PYTHON)' has no venv module. Install it (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' || \
	  { echo "The C headers of '$(PYTHON)' are missing. Install them (Debian, Ubuntu: apt install python3-dev)."; exit 1; }
	@for c in "$${CXX:-c++}" g++ clang++; do command -v $$c >/dev/null && exit 0; done; \
	  echo "No C++ compiler found. Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)."; exit 1

$(STAMP): requirements.txt pyproject.toml setup.py
	@$(MAKE) --no-print-directory tools
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: $(STAMP) ## compile what changed in csrc
	@$(BIN)/python setup.py -q build_ext --inplace

test: build ## run the tests (ARGS="-k nvfp4" chooses)
	$(PYTEST) $(ARGS)

demo: build ## quantize a real model into every format; table, JSON and chart in out/
	$(BIN)/pyfmt compare $(ARGS)

demo-quick: build ## the same in under a minute
	$(BIN)/pyfmt compare --quick $(ARGS)

bench: build ## measure this machine's kernels against their rivals (a GPU's where there is one)
	for job in $(wildcard $(patsubst %,bench/%.py,quantize matmul overhead)); do $(BIN)/python $$job $(ARGS) || exit; done

study: build ## INT against FP: theory, drawn data and a real model's tensors, in out/
	$(BIN)/pyfmt study $(ARGS)

lint: build ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/python -m pyfmt._codegen --check
	$(BIN)/python bench/study_page.py --check

format: $(STAMP) ## format Python and C++, and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

codegen: $(STAMP) ## write what follows from pyfmt/formats.py: csrc/formats.inc, README's table
	$(BIN)/python -m pyfmt._codegen

# A second checkout in small, with sanitized libraries: the normal build stays as it is. libstdc++
# is loaded early too, else the sanitizer stops at the first C++ exception.
SANITIZED := build/sanitize
PRELOAD = $(foreach lib,libasan.so libstdc++.so.6,$(shell $${CXX:-c++} -print-file-name=$(lib)))
ROOMS := $(patsubst %,tests/test_%.py,quantize cpu_tiles rotate layout matmul matmul_levels ops nn)
# What only Python computes, and torch's compiler, take minutes here and show nothing.
NOT_ROOMS := oracle or scale_arithmetic or compile or opcheck
sanitize: build ## test the compiled rooms under the address and undefined-behaviour sanitizers
	NVCC= PYFMT_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	cp -R tests csrc README.md pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && PYTHONPATH=. PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(PRELOAD)" $(CURDIR)/$(PYTEST) -m "not slow" \
	  -k "not ($(NOT_ROOMS))" $(ROOMS) $(ARGS)

wheel: build ## wheel and source archive in dist/
	$(BIN)/pyproject-build --no-isolation

clean: ## remove what was built; .venv stays
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f pyfmt/*.so
	find pyfmt tests bench csrc -name __pycache__ -type d -prune -exec rm -rf {} +
