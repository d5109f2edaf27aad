# `make demo` and `make test` set up all they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Pictures for the benchmarks that want real ones: an image folder with train/CLASS and test/CLASS.
SOURCE ?= folder:cifar
RUNS ?= 1000000
COUNT ?= 200
# Processes that tests are spread over; 0: one after the other. More than cores, for much of the suite waits.
JOBS ?= 3
MINUTES ?= 60
# Of the demo: auto, step or context.
CODEC ?= auto

.PHONY: setup demo test lint bench-step bench-codec bench-effect bench-learning bench-ways bench-counters bench-checkpoint bench-limits bench-links bench-start fuzz faults soak clean

setup: $(VENV)/.ready

# torch comes first, so that PIP_EXTRA_INDEX_URL (README.md) is heard for it: without, it brings several GB of CUDA on
# Linux. What numba compiles, some seconds, is compiled at once and not in somebody's first run.
$(VENV)/.ready: pyproject.toml constraints.txt protos/split.proto hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import common.codecs.loops, common.codecs.mixing'
	@touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo $(CODEC)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-step: setup
	$(BIN)/python -m benchmarks.step

bench-codec: setup
	$(BIN)/python -m benchmarks.codec $(SOURCE)

bench-learning: setup
	$(BIN)/python -m benchmarks.learning $(SOURCE) $(ARGS)

# Ways to send less that were tried and left out.
bench-ways: setup
	$(BIN)/python -m benchmarks.ways $(SOURCE)

bench-checkpoint: setup
	$(BIN)/python -m benchmarks.checkpoint

# Minutes; ARGS='--opens 10000' makes them fewer.
bench-limits: setup
	$(BIN)/python -m benchmarks.limits $(ARGS)

# Some fifteen minutes; without root it leaves out what needs network namespaces.
bench-links: setup
	$(BIN)/python -m benchmarks.links

bench-start: setup
	$(BIN)/python -m benchmarks.start

bench-effect: setup
	$(BIN)/python -m benchmarks.effect $(SOURCE) $(ARGS)

# Needs root: it makes network namespaces.
bench-counters: setup
	$(BIN)/python -m benchmarks.counters

# The matrix, and COUNT faults in one run; ARGS=--matrix or --random takes one of the two, --seed repeats the latter;
# ARGS='--matrix --point NAME' takes one place of the matrix.
faults: setup
	$(BIN)/python -m benchmarks.faults --count $(COUNT) $(ARGS)

soak: setup
	$(BIN)/python -m benchmarks.soak $(MINUTES) $(ARGS)

fuzz: setup
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m fuzz.decode -runs=$(RUNS)

clean:
	rm -rf $(VENV) common/rpc build dist *.egg-info
