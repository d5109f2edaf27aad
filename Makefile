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

.PHONY: help setup demo test lint wheel distclean bench-step bench-codec bench-effect bench-learning bench-ways bench-counters bench-checkpoint bench-limits bench-links bench-start fuzz faults soak clean

help:
	@echo 'make demo       sets up .venv, trains the bundled digits with both processes'
	@echo 'make test       sets up .venv and passes the tests (JOBS=3)'
	@echo 'make setup      sets up .venv alone; make lint; make wheel builds the package and tries it outside this folder'
	@echo 'make faults     breaks a run on purpose, COUNT times; make soak for MINUTES; make fuzz for RUNS'
	@echo 'make bench-…    step codec effect learning ways counters checkpoint limits links start: what makes the figures of'
	@echo '                README.md and docs/, from SOURCE=folder:PATH where they want pictures; ARGS=… as each says above its rule'
	@echo 'make clean      removes .venv and what was built; make distclean also runs, caches and corpora'

setup: $(VENV)/.ready

# torch comes first, so that PIP_EXTRA_INDEX_URL (README.md) is heard for it: without, it brings several GB of CUDA on
# Linux. What numba compiles, some seconds, is compiled at once and not in somebody's first run.
$(VENV)/.ready: pyproject.toml constraints.txt protos/split.proto hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo 'Setting up $(VENV): torch and the rest are downloaded, a minute or more.'
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

# Hours; ARGS=--quick a quarter of one, and docs/results.md has the others.
bench-learning: setup
	$(BIN)/python -m benchmarks.learning $(SOURCE) $(ARGS)

# Ways to send less that were tried and left out; ARGS='--seeds 3'.
bench-ways: setup
	$(BIN)/python -m benchmarks.ways $(SOURCE) $(ARGS)

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

# ARGS=--long takes 20 epochs.
bench-effect: setup
	$(BIN)/python -m benchmarks.effect $(SOURCE) $(ARGS)

# Needs root: it makes network namespaces.
bench-counters: setup
	$(BIN)/python -m benchmarks.counters

# The matrix, and COUNT faults in one run; ARGS=--matrix or --random takes one of the two, --seed repeats the latter;
# ARGS='--matrix --point NAME' takes one place of the matrix.
faults: setup
	$(BIN)/python -m benchmarks.faults --count $(COUNT) $(ARGS)

# ARGS='--seed 7' other faults.
soak: setup
	$(BIN)/python -m benchmarks.soak $(MINUTES) $(ARGS)

fuzz: setup
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m fuzz.decode -runs=$(RUNS)

# The wheel as a user gets it: in an environment of its own, beside the packages of .venv, from another folder.
wheel: setup
	rm -rf dist && $(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .
	rm -rf dist/venv && $(PYTHON) -m venv --without-pip dist/venv
	$(BIN)/pip --python dist/venv install -q --disable-pip-version-check --no-deps dist/*.whl
	cd dist && PYTHONPATH=$$(../$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && export PYTHONPATH && \
	  venv/bin/python -c 'import common, pathlib; assert "dist" in pathlib.Path(common.__file__).parts, common.__file__' && \
	  venv/bin/edge-server recipes && venv/bin/edge-server --version && venv/bin/device-client --version

clean:
	rm -rf $(VENV) common/rpc build dist *.egg-info

distclean: clean
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis fuzz/corpus fuzz/compiled
	find . -name __pycache__ -prune -exec rm -rf {} +
