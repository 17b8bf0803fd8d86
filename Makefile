# make train: set everything up and run the main job.  make test: linters and all tests.
# TORCH is the build to install, e.g. make train TORCH="torch==2.14.1".
VENV := .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONFIG ?= configs/quickstart.yaml
STAMP := $(VENV)/.installed

.PHONY: train test install clean

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@

install: $(STAMP)

train: $(STAMP)
	$(VENV)/bin/python cluster/local.py submit -- python pipelines/train.py --config $(CONFIG) $(ARGS)

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

clean:
	rm -rf $(VENV) build *.egg-info
