# make train: set everything up and run the main job.  make test: linters and all tests.
# TORCH is the build to install, e.g. make train TORCH="torch==2.14.1".
VENV := .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONFIG ?= configs/quickstart.yaml

.PHONY: train test clean

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@

train: $(VENV)/.installed
	$(VENV)/bin/python cluster/local.py submit -- python pipelines/train.py --config $(CONFIG) $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) build *.egg-info
