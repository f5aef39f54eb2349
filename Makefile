# Everything sets itself up: `make serve` and `make test` work from a clean clone with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
export TOSCA_STORE ?= .tosca/store

.DEFAULT_GOAL := help
.PHONY: help install demo serve stop check format test test-slow test-docker bench constraints clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## virtual environment with every extra, pinned by constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[service,training,openvino,demo,dev]'
	touch $@

demo: .tosca/demo.done ## default backbone and two demo tasks, trained on real pictures

.tosca/demo.done: $(VENV)/.installed
	$(BIN)/tosca demo
	touch $@

serve: demo ## start the server in the background and print a curl to try
	@$(BIN)/python -m service.background start --port $(PORT)

stop: ## stop the server that `make serve` started
	@$(BIN)/python -m service.background stop

check: install ## lint, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: demo ## the fast tests, on the real backbone and real pictures
	$(BIN)/pytest

test-slow: demo ## tests that take minutes
	$(BIN)/pytest -m slow

test-docker: demo .tosca/docker-tools/.installed ## containers and manifests for real; needs Docker, takes minutes
	TOSCA_DOCKER_TESTS=1 $(BIN)/pytest tests/docker --timeout 2400 -rs -s

# In an environment of their own, so that constraints.txt stays what the product needs.
.tosca/docker-tools/.installed:
	$(PYTHON) -m venv .tosca/docker-tools
	.tosca/docker-tools/bin/python -m pip install --quiet check-jsonschema==0.39.0 kubernetes-validate==1.37.0
	touch $@

# Other servers to measure against and the load generator: the product's packages lie beneath theirs.
.tosca/peers/.installed: $(VENV)/.installed benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .tosca/peers
	.tosca/peers/bin/python -m pip install --quiet --constraint constraints.txt -r benchmarks/peers/requirements.txt
	echo $(CURDIR)/$(VENV)/lib/python*/site-packages \
	  > $$(echo .tosca/peers/lib/python*/site-packages)/product.pth
	touch $@

bench: demo .tosca/peers/.installed ## every benchmark; JSON under benchmarks/results/
	$(BIN)/python -m benchmarks

constraints: install ## rewrite constraints.txt from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt

clean: stop ## remove the virtual environment and everything made by the demo
	rm -rf $(VENV) .tosca
