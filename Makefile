# make env   a virtual environment in .venv with the pinned versions; again only after setup.py or constraints.txt changed
# make demo  train a classifier on real data through experts in other processes, then:
# make demo-model  fine-tune a pretrained language model over servers, one of which is killed
# make test  everything that is checked before a commit
# make lint  the same without pytest
# make test-transports  the tests on real servers once for each way tensors can travel (the default is what make test runs)
#
# Needs a Python 3.10 to 3.13 with venv: PYTHON=/path/to/python chooses one. pip's own settings (PIP_...) are honoured.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

.PHONY: demo demo-model test test-transports lint env clean
.DEFAULT_GOAL := test

demo: env
	$(BIN)/python examples/digits_demo.py
	$(BIN)/python examples/finetune_lora.py

demo-model: env
	$(BIN)/python examples/finetune_lora.py

test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-transports: env
	for transport in unix tls libp2p; do \
		$(BIN)/python -m pytest -n 3 --dist loadfile tests/swarm --transport $$transport || exit 1; done

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

env: $(READY)

$(READY): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 with venv found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,demo]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
