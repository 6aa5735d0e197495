# Easel's commands; `make` lists them. Everything is set up in .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
# Debian's packages for tests, which skip what is missing (promtool is prometheus'), and for the container's proof
SYSTEM := prometheus chromium chromium-driver postgresql buildah debootstrap

.PHONY: help serve test fuzz soak load system lint lock sbom audit keys bench bento container prove-container clean
help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/'

serve: .venv/serve.stamp keys  ## set up and serve on 127.0.0.1:3000
	@exec $(BIN)/bentoml serve service:ImageGeneration --timeout-graceful-shutdown 10

test: .venv/test.stamp  ## set up and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

system:  ## install the programs that some tests and prove-container need, with apt-get; as root
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(SYSTEM)

lint: .venv/test.stamp  ## run the linters
	$(BIN)/ruff check .
	$(BIN)/mypy

keys: .venv/serve.stamp  ## write API keys into .env where there are none, and say how to call
	@$(BIN)/python -m core.keys

bench: .venv/test.stamp  ## measure against raw diffusers and other servers; writes bench/results.md
	$(BIN)/python bench/run.py $(ARGS)
	$(BIN)/python bench/queue_cost.py

fuzz: .venv/test.stamp  ## fuzz the HTTP contract and the picture decoder at length
	$(BIN)/python -m tests.fuzz.contract --cases 200
	$(BIN)/python -m tests.fuzz.pictures --inputs 100000

soak: .venv/test.stamp  ## an hour of mixed work, which must leave the server as it was
	$(BIN)/python -m tests.reliability.soak --minutes 60

load: .venv/test.stamp  ## more requests than the server can do, which must not make it slower
	$(BIN)/python -m tests.reliability.load --minutes 5

bento: .venv/serve.stamp  ## build a Bento
	EASEL_AUTH__MODE=off $(BIN)/bentoml build

container: .venv/serve.stamp  ## build the image easel:cuda, or easel:cpu with FLAVOUR=cpu
	deploy/container/build.sh $(or $(FLAVOUR),cuda)

prove-container: .venv/serve.stamp  ## build the CPU image with buildah, start it, and have it draw; as root
	$(BIN)/python deploy/prove_container.py $(ARGS)

lock: .venv/python.stamp  ## resolve pyproject.toml anew into requirements.lock and requirements-dev.lock
	rm -rf .venv/lock && $(PYTHON) -m venv .venv/lock && .venv/lock/bin/pip install -q -U pip
	.venv/lock/bin/pip install -q torch==2.13.0 && .venv/lock/bin/pip install -q .
	.venv/lock/bin/pip freeze --exclude easel | sed 's/+cpu//' > requirements.lock
	.venv/lock/bin/pip install -q --group dev -c requirements.lock
	.venv/lock/bin/pip freeze --exclude easel | sed 's/+cpu//' | grep -vxFf requirements.lock > requirements-dev.lock
	rm -rf .venv/lock build easel.egg-info
	$(MAKE) sbom

sbom: .venv/parts.stamp  ## write the Bento's bill of materials (CycloneDX) from requirements.lock
	.venv/parts/bin/cyclonedx-py requirements requirements.lock --output-reproducible --of JSON -o sbom.cdx.json

audit: .venv/parts.stamp  ## look for advisories on what is pinned; asks pypi.org
	.venv/parts/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock -r requirements-upscale.lock

clean:  ## remove the virtual environment, and those of the benchmark
	rm -rf .venv bench/.cache

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Easel needs Python 3.11 or later; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv && touch $@

.venv/parts.stamp: .venv/python.stamp
	$(PYTHON) -m venv .venv/parts && .venv/parts/bin/pip install -q --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1 && touch $@

.venv/serve.stamp: .venv/python.stamp requirements.lock requirements-upscale.lock
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements-upscale.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e . && touch $@

.venv/test.stamp: .venv/serve.stamp requirements-dev.lock requirements-dev-nodeps.lock
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.lock -c requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements-dev-nodeps.lock && touch $@
