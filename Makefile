# `make demo` runs the main job, `make test` the tests; both set up everything they need in .venv.
PYTHON ?= python3
PY := .venv/bin/python
WORKERS ?= 2
SEED ?= 0
BASE ?= runs/digits-base
# pip compiles modules on one core; here all do it. Some of torch's are for a newer Python: that is no failure.
INSTALL = $(PY) -m pip install --quiet --no-compile
COMPILE = $(PY) -m compileall -qq -j 0 .venv/lib || true

.PHONY: test test-benchmarks lint demo demo-grpo base bench clean

test: .venv/.test lint
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore=tests/test_benchmarks.py

# Whether the benchmarks run, on tiny problems.
test-benchmarks: .venv/.test
	$(PY) -m pytest -n $(WORKERS) tests/test_benchmarks.py

lint: .venv/.test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# Convert, train PVM and its control, evaluate, generate, export: tables and pictures under runs/demo.
demo: .venv/.demo
	PYTHON=$(PY) bash demo.sh

# The second stage, GRPO, from the demo's result.
demo-grpo: .venv/.demo
	PYTHON=$(PY) bash demo_grpo.sh

# Trains the checkpoint in assets/ again, as $(BASE)-hf; with another SEED, another base.
base: .venv/.demo
	$(PY) -m pvm_jax.data.prepare_digits runs/data --configs=base,text
	$(PY) train.py --config=configs/digits_base.py --workdir=$(BASE) --config.seed=$(SEED)
	$(PY) train.py --config=configs/digits_base.py:long --workdir=$(BASE)-long --config.seed=$(SEED) --config.model.path=$(BASE)
	$(PY) -m pvm_jax.convert to_hf $(BASE)-long $(BASE)-hf

# Ratios against transformers; wants a quiet machine.
bench: .venv/.test
	$(PY) benchmarks/vs_transformers.py

.venv/.test: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[demo,test]'
	$(COMPILE)
	touch $@

.venv/.demo: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[demo]'
	$(COMPILE)
	touch $@

clean:
	rm -rf .venv runs
