# Everything goes into .venv; nothing else is touched. Needs python3 (3.11 or newer) with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SEED ?= 0
# For two cores: half of its time a test waits, for Ray or a server.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help install demo test unit long bases chaos servers exporters fuzz soak cluster lint format bench lock clean

help:  ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): .ci/requirements.txt .ci/requirements-nodeps.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tlbatch needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .ci/requirements-nodeps.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

install: $(INSTALLED)  ## Set everything up in .venv

demo: $(INSTALLED)  ## Train on photographs of solar cells and classify all of them
	$(BIN)/tlbatch demo

unit: $(INSTALLED)  ## Run the unit tests: no Ray, under a minute
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

AZURITE := .venv-azurite/node_modules/.bin/azurite-blob
$(AZURITE):
	@npm install --silent --no-save --fetch-retries 1 --fetch-timeout 60000 --prefix .venv-azurite azurite@3.37.0 \
		|| echo "Azurite could not be installed (npm is not here, or finds no registry): the tests of Azure are skipped."

MLFLOW := .venv-mlflow/bin/mlflow
$(MLFLOW): $(INSTALLED)
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-mlflow
	@$(BIN)/uv pip install --quiet --python .venv-mlflow/bin/python mlflow==3.17.2 \
		|| echo "MLflow could not be installed: its tests are skipped."

LAKES := .venv-lakes/bin/python
$(LAKES): $(INSTALLED)
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-lakes
	@$(BIN)/uv pip install --quiet --python $@ duckdb==1.5.5 duckdb-extension-delta==1.5.5 polars==2.1.0 deltalake==1.6.6 \
		"pyiceberg[pyarrow]==0.12.0" || { echo "DuckDB and Polars could not be installed: their tests are skipped."; rm -r .venv-lakes; }

test: $(INSTALLED) $(AZURITE) $(MLFLOW) $(LAKES)  ## Run the tests; of the long ones a sample, which SEED=N draws anew
	TLBATCH_SAMPLE=$(SEED) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

long: $(INSTALLED)  ## Run all the long tests of which make test does a sample
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m sampled

bases: $(INSTALLED)  ## Build every base of keras.applications (make test does a sample)
	TLBATCH_BASES=all $(BIN)/python -m pytest --timeout 900 tests/integration/test_bases_built.py

chaos: $(INSTALLED) $(AZURITE)  ## Bad networks, kills at every step, holes in the store, 300 readers, 1,000 nights of the protocol; make test does a sample
	TLBATCH_CHAOS=50 $(BIN)/python -m pytest -s tests/system/test_chaos.py
	TLBATCH_CHAOS=20 $(BIN)/python -m pytest -s tests/system/test_azure.py
	TLBATCH_KILLS=50 $(BIN)/python -m pytest -s tests/system/test_kills.py
	TLBATCH_HOLES=300 $(BIN)/python -m pytest -s --timeout 3600 tests/integration/test_holes_model.py
	TLBATCH_READERS=50 $(BIN)/python -m pytest tests/integration/test_readers.py
	TLBATCH_EXAMPLES=1000 $(BIN)/python -m pytest --timeout 1800 tests/unit/output/test_protocol.py

servers: $(INSTALLED)  ## What six S3 servers do, against docs/stores.md (make test does three; they go into .venv-servers; needs npm)
	$(BIN)/uv venv --quiet --allow-existing .venv-servers
	$(BIN)/uv pip install --quiet --python .venv-servers/bin/python nanio==0.1.7 localbucket==1.2.1
	npm install --silent --no-save --prefix .venv-servers s3rver@3.7.1
	TLBATCH_SERVERS=all $(BIN)/python -m pytest tests/system/test_servers.py

exporters: $(INSTALLED)  ## Models of usual size by PyTorch's exporters (5 GB of PyTorch go into .venv-exporters; make test reads small ones)
	$(BIN)/uv venv --quiet --allow-existing .venv-exporters
	$(BIN)/uv pip install --quiet --python .venv-exporters/bin/python torch==2.15.0 timm==1.0.31 onnx==1.23.2 onnxscript==0.7.2
	rm -rf .venv-exporters/models && mkdir .venv-exporters/models
	.venv-exporters/bin/python -W ignore tests/support/onnx_models.py .venv-exporters/models
	TLBATCH_EXPORTERS=.venv-exporters/models $(BIN)/python -m pytest --timeout 1200 tests/integration/test_exporters.py

fuzz: $(INSTALLED)  ## Hostile bytes for every reader, six minutes each (make test does a sample)
	TLBATCH_FUZZ_SECONDS=360 TLBATCH_EXAMPLES=5000 $(BIN)/python -m pytest -s --timeout 3600 tests/system/test_fuzz.py

soak: $(INSTALLED)  ## Up to 500,000 images over S3, or an hour, with one request in a hundred failing (make test does a sample)
	TLBATCH_SOAK_SECONDS=3600 $(BIN)/python -m pytest -s --timeout 12000 tests/system/test_soak.py

cluster: $(INSTALLED)  ## 5,000 images on three hosts, with a host cut off; nights of 1,000 images (as root; make test does a sample)
	TLBATCH_CLUSTER_IMAGES=5000 $(BIN)/python -m pytest -s --timeout 900 tests/system/test_cluster.py
	TLBATCH_NIGHTS=1000 $(BIN)/python -m pytest -s --timeout 900 tests/system/test_nights.py

lint: $(INSTALLED)  ## Check style, types and pinned packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --no-strict-optional --ignore-missing-imports --allow-any-generics --allow-untyped-decorators --no-warn-return-any benchmarks
	$(BIN)/python .ci/audit.py

format: $(INSTALLED)  ## Put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Measure, against peers, in one run, and write docs/benchmarks.md (hours; peers go into .venv-peers)
	$(BIN)/python benchmarks/document.py

lock: $(INSTALLED)  ## Pin and hash the requirements anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra demo --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file .ci/requirements.txt

clean:  ## Remove what make made
	rm -rf .venv .venv-peers .venv-servers .venv-azurite .venv-mlflow .venv-lakes .venv-exporters .mypy_cache .pytest_cache .ruff_cache tlbatch-demo
