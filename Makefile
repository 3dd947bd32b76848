# Two commands do everything: `make demo` and `make test`. Both make .venv on first use and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
# Processes that share the test files out among them.
JOBS ?= 2
BIN := $(VENV)/bin
# A file stays in one process, in the order of names. Threads that wait leave their core to the other process.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
NATIVE := $(shell find csrc CMakeLists.txt setup.py pyproject.toml constraints.txt -type f 2>/dev/null)

FIND_SOURCES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SANITIZED := $(abspath build/sanitized)

.PHONY: install test lint format sanitize demo bench bench-check clean

install: $(VENV)/.installed

$(VENV)/.created:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# Installs the pinned set and compiles the native module; runs again when the sources or the pins change.
$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=77,<82" wheel pybind11 cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[train,test]"
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(FIND_SOURCES) | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(FIND_SOURCES) | xargs -r $(BIN)/clang-format -i

test: lint
	$(PYTEST) tests

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set there is and, with
# AVX512_BF16, on AMX's tiles in plain code, in a copy of the package. Python itself leaks on purpose, so leaks are not looked for.
sanitize: install
	rm -rf $(SANITIZED)/package && mkdir -p $(SANITIZED)/package && cp -r fnac_kernels $(SANITIZED)/package/
	rm -f $(SANITIZED)/package/fnac_kernels/*.so
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED)/native -GNinja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DFNAC_SANITIZE=ON -DFNAC_EMULATE_TILES=ON -DFNAC_CUDA=off -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(SANITIZED)/package/fnac_kernels >/dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)/native
	export PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED)/package ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" && \
	$(BIN)/python -c "import fnac_kernels._C as native; assert native.__file__.startswith('$(SANITIZED)'), native" && \
	$(PYTEST) tests/test_backends.py tests/test_cpu_exact.py tests/test_cpu_backend.py \
		tests/test_kept_memory.py

# Makes data, trains, evaluates and writes runs/demo/report.html, in about 15 minutes on 2 cores, less with bfloat16.
demo: install
	$(BIN)/fnac demo

# What the kernels are worth on this machine, in about 5 minutes on 2 cores; the rivals come with `pip install -e .[bench]`.
bench: install
	$(BIN)/python -m bench

# A guard against regressions: ratios to plain PyTorch, measured in one run.
bench-check: install
	$(BIN)/python -m bench.check

# Without its stamp the next command builds again.
clean:
	rm -rf build *.egg-info fnac_kernels/*.so $(VENV)/.installed
