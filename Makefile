# Every target works on a machine that has only Python (with venv), make and a C++20 compiler.
#
#   make demo | test | bench | lint | clean
#
# PYTHON   the interpreter that .venv is made from            (default python3)
# TORCH    the torch requirement installed into a new .venv   (default torch; e.g. TORCH="torch==2.11.*")
# ARGS     more arguments for the tool behind the target      (e.g. make test ARGS="-k planner")
PYTHON ?= python3
TORCH ?= torch
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | sed 's/", "/" "/g')
CXX_FILES := $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
CSRC := $(shell find csrc -type f)

.PHONY: demo test bench lint clean install

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# Without build isolation, so that the modules are compiled against the torch they will run with.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	$(BIN)/python -m pip install --quiet $(BUILD_REQUIRES)
	$(BIN)/python -m pip install --verbose --no-build-isolation --editable ".[test,bench,demo,lint]"
	touch $@

demo: install
	$(BIN)/python -m bench demo $(ARGS)

# One process per core and one OpenMP thread in each: most tests are far too small for more.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n auto --maxprocesses=8 \
	  --junitxml=build/test-report.xml $(ARGS)

bench: install
	$(BIN)/python -m bench $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info lkconv/*.so lkconv/_C_cuda_resources.json lkconv/triton_kernels \
	  .pytest_cache .hypothesis .ruff_cache .mypy_cache
