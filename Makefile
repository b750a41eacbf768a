# Everything happens in .venv; OMP_WAIT_POLICY=passive keeps two threads from spinning against other processes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive
# Holds for what is installed and, under either name that pip has had for it, for the tools that build the package.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.PHONY: setup models demo test check variants sanitize fuzz format bench docs clean

setup: $(VENV)/dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What running needs. `torch==` of the constraints is a CPU build where the package index offers one.
# The native kernels are compiled on the way where there is a C++ compiler.
PACKAGES := $(wildcard src/sparing/*/__init__.py src/sparing/*/*/__init__.py) # an editable install lists its packages
$(VENV)/run: $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard tools/* src/sparing/kernels/cpu/*) $(PACKAGES)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable .
	touch $@

# What testing and checking need on top.
$(VENV)/dev: $(VENV)/run
	$(BIN)/pip install --quiet "sparing[test,dev,plot]"
	$(BIN)/python tools/real_models.py smollm2 || echo "SmolLM2 not available: its tests will be skipped"
	$(BIN)/python tools/llama_cpp_data.py || echo "vocabularies of llama.cpp not available: their tests will be skipped"
	touch $@

# Real models for the tests of group `real`, 840 MB; make models MODELS=qwen2.5-coder-1.5b for a certain one
models: $(VENV)/run
	$(BIN)/python tools/real_models.py $(MODELS)

demo: $(VENV)/run
	$(BIN)/sparing demo

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --pythonversion 3.14
	$(BIN)/python -W error -m compileall -q -f src tests tools benchmarks

# Built without a compiler, for the newest Python that is here, and under sanitizers where the native sources changed.
variants: $(VENV)/dev sanitize
	$(BIN)/python tools/variants.py plain
	$(BIN)/python tools/variants.py newest

# After a change of kernels/cpu: sanitizers, and tests/kernels/sanitized.json to be committed with it.
sanitize: $(VENV)/dev
	$(BIN)/python tools/variants.py sanitize

# Mutated inputs beyond those of the suite: make fuzz COUNT=100000 SEED=7
fuzz: $(VENV)/dev
	$(BIN)/python tools/fuzz.py --count $(or $(COUNT),5000) --seed $(or $(SEED),1)

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All but what they share, those that need another program or finished training runs, and figures.
NO_BENCHMARKS := $(addprefix benchmarks/,harness.py texts.py plot.py llama_cpp.py nvfp4_training.py)

bench: $(VENV)/dev
	for file in $(filter-out $(NO_BENCHMARKS),$(sort $(wildcard benchmarks/*.py))); do $(BIN)/python $$file || exit 1; done

docs: $(VENV)/dev
	$(BIN)/python -m sparing.learn.problems > docs/problems.md

clean:
	rm -rf $(VENV) build dist
