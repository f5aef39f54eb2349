# Everything sets itself up: `make serve` and `make test` work from a clean clone with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
export TOSCA_STORE ?= .tosca/store

.DEFAULT_GOAL := help
.PHONY: help install demo serve stop check format test test-slow test-docker test-api docs figures bench soak fuzz lock sbom audit protocol openapi constraints clean test-monitoring test-browser screenshots browser

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## virtual environment with every extra, pinned by constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[service,training,datasets,hub,openvino,ray,tracing,demo,docs,dev]'
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

docs: install ## the documentation site: .tosca/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

figures: install ## draw docs/figures/method-*.svg again
	$(BIN)/python -m website.diagrams docs/figures

format: install ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: demo .tosca/protocol-clients/.installed ## the fast tests, on the real backbone and real pictures
	$(BIN)/pytest

test-slow: demo browser ## tests that take minutes
	$(BIN)/pytest -m slow

test-browser: demo browser ## the console in Chromium; takes a minute
	$(BIN)/pytest -m slow tests/browser -rs

screenshots: demo browser ## what the documents show of the console: docs/figures/console-*.webp
	TOSCA_SCREENSHOTS=docs/figures $(BIN)/pytest -m slow tests/browser -k screenshots -rs

browser: ## Chromium for the tests of the console, from Debian's packages where there is none
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { apt-get update -qq && apt-get install --yes -qq chromium; } \
	  || echo "no Chromium, and none could be installed: the tests of the console will be skipped"

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
	grep -vE '^(certifi|opentelemetry-)' constraints.txt > .tosca/peers/constraints.txt  # BentoML wants others
	.tosca/peers/bin/python -m pip install --quiet --constraint .tosca/peers/constraints.txt -r benchmarks/peers/requirements.txt
	echo $(CURDIR)/$(VENV)/lib/python*/site-packages \
	  > $$(echo .tosca/peers/lib/python*/site-packages)/product.pth
	touch $@

bench: demo .tosca/peers/.installed ## every benchmark; JSON under benchmarks/results/
	$(BIN)/python -m benchmarks

soak: demo ## SOAK_S seconds (600) of churn on the real backbone, SOAK_KILLS (6) kills, every answer replayed
	$(BIN)/python -m benchmarks.soak

# Tools in environments of their own, so that constraints.txt stays what the product needs.
.tosca/fuzz-tools/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --target .tosca/fuzz-tools atheris==3.0.0
	touch $@

.tosca/protocol-clients/.installed: tests/protocol_clients/requirements.txt
	$(PYTHON) -m venv .tosca/protocol-clients
	.tosca/protocol-clients/bin/python -m pip install --quiet -r tests/protocol_clients/requirements.txt
	touch $@

.tosca/api-tools/.installed:
	$(PYTHON) -m venv .tosca/api-tools
	.tosca/api-tools/bin/python -m pip install --quiet schemathesis==4.32.5
	touch $@

.tosca/lock-tools/.installed:
	$(PYTHON) -m venv .tosca/lock-tools
	.tosca/lock-tools/bin/python -m pip install --quiet pip-tools==7.6.2 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

# torch and torchvision are left out but for CUDA: their CPU builds, on another index, carry the same version and
# other hashes. Settings that could bring a CPU build are set aside for the CUDA list.
PIP_COMPILE = CUSTOM_COMPILE_COMMAND="make lock" .tosca/lock-tools/bin/pip-compile --quiet --generate-hashes --strip-extras \
	--constraint constraints.txt --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-annotate
SERVICE_EXTRAS := --extra service --extra openvino --extra tracing
WITHOUT_TORCH := --unsafe-package torch --unsafe-package torchvision

lock: .tosca/lock-tools/.installed ## rewrite what the images install, pinned, with hashes: requirements/*.lock
	$(PIP_COMPILE) $(WITHOUT_TORCH) $(SERVICE_EXTRAS) --output-file requirements/cpu.lock pyproject.toml
	$(PIP_COMPILE) $(WITHOUT_TORCH) $(SERVICE_EXTRAS) --extra training --extra demo --output-file requirements/trainer.lock pyproject.toml
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(PIP_COMPILE) --allow-unsafe $(SERVICE_EXTRAS) --output-file requirements/cuda.lock pyproject.toml

sbom: install .tosca/lock-tools/.installed ## what is installed, as CycloneDX JSON: .tosca/sbom.cdx.json
	.tosca/lock-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file .tosca/sbom.cdx.json $(BIN)/python

audit: .tosca/lock-tools/.installed ## known vulnerabilities of requirements/cpu.lock (asks PyPI's advisory service)
	.tosca/lock-tools/bin/pip-audit --require-hashes --disable-pip --requirement requirements/cpu.lock

# Debian's package, unpacked and not installed.
.tosca/prometheus/.unpacked:
	mkdir -p .tosca/prometheus
	cd .tosca/prometheus && apt-get download prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	touch $@

test-monitoring: install .tosca/prometheus/.unpacked ## alert rules and every query of the dashboard, by a real Prometheus; needs Debian
	$(BIN)/pytest tests/test_prometheus.py -m slow -s

fuzz: install .tosca/fuzz-tools/.installed ## FUZZ_S seconds (120) of fuzzing for each reader of strangers' bytes
	PYTHONPATH=.tosca/fuzz-tools $(BIN)/python tests/fuzz/__main__.py

test-api: install .tosca/api-tools/.installed ## the OpenAPI document against the service, by schemathesis
	$(BIN)/pytest tests/test_openapi.py -m slow -s

openapi: install ## write docs/openapi.json, which a test compares with the service
	$(BIN)/python -m service.openapi docs/openapi.json

protocol: install ## compile service/open_inference/inference.proto
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. service/open_inference/inference.proto

constraints: install ## rewrite constraints.txt from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt

clean: stop ## remove the virtual environment and everything made by the demo
	rm -rf $(VENV) .tosca
