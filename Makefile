# `make demo` and `make test` install what they need into .venv, and are quick the second time.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# Processes that run tests, each whole files: the first ones first. Each may start servers.
TEST_PROCESSES ?= 2
# The model of the demo: a name or folder that transformers and vLLM can load; empty = a small one.
MODEL ?=
# Bytecode is written when a module is first imported (installation writes none, see below): else
# each of the many processes here, where this variable forbids it, would compile vLLM for itself.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint kernels bench clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m examples.demo $(if $(MODEL),--model $(MODEL))

test: $(INSTALLED)
	$(MAKE) --jobs=2 lint kernels
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Of CPUs, all at once: else each process of the tests compiles its own.
kernels: $(INSTALLED)
	$(VENV)/bin/python -m tests.compile_kernels

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.research_attention
	$(VENV)/bin/python -m benchmarks.paged_attention
	$(VENV)/bin/python -m benchmarks.served_throughput

# The last line is reached only when everything is there, so a broken install is taken up again.
# (Most modules are never imported: those that are get their bytecode then, see --no-compile.)
$(INSTALLED): requirements/cpu-dev.lock.txt requirements/vllm-name/pyproject.toml pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --no-compile -r requirements/cpu-dev.lock.txt
	$(PIP) install --no-deps --no-build-isolation ./requirements/vllm-name
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
