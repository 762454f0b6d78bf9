# make demo: caption the sample images; make test; make lint. Each sets itself up first (PYTHON=... chooses the Python).
BIN := .venv/bin
CAPTION := assets/samples --ckpt assets/vlv-tiny -o out/captions.jsonl --gallery out/gallery.html --no-resume
ARGS :=
JOBS := 2
HF_KERNELS := .venv/hf-kernels
CLIENTS := .venv/clients
ALL := .venv/all
export PYTHON

.PHONY: demo test test-all test-clients coverage lint setup setup-test clean

demo: setup
	@mkdir -p out
	@$(BIN)/python -m serve.vllm_caption $(CAPTION)
	@echo "captions: $(CURDIR)/out/captions.jsonl"
	@echo "gallery:  $(CURDIR)/out/gallery.html"

# make test ARGS="-k davit -x" JOBS=1; each of the JOBS takes a core, up to 6 GB, and a file at a time: the longest first
# (tests/conftest.py)
test: setup-test $(HF_KERNELS)/done
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# also what `make test` skips for want of a package: Ray, clouds, data sets, Kubernetes, containers, alerts, mkdocs, clients.
# pip has neither helm (HELM=/path names one) nor Chromium: without them their tests are skipped
test-all: setup-test $(HF_KERNELS)/done $(CLIENTS)/done $(ALL)/done
	@PATH="$(CURDIR)/$(ALL)/bin:$$PATH" $(ALL)/bin/python -m pytest -rs $(ARGS)

$(ALL)/done: requirements/test-all.in | setup-test
	@scripts/overlay_venv.sh $(@D) -r $<

# make coverage ARGS=tests/serve: what the tests run, commands that they start included
coverage: setup-test $(HF_KERNELS)/done
	@$(BIN)/python -m coverage erase
	@$(BIN)/python -m coverage run -m pytest $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --skip-covered

# other people's clients against the server: LangChain, LiteLLM, LlamaIndex, guidellm, OpenAI for Node (where npm is),
# vLLM's benchmark; guidellm needs PyTorch, and takes that of .venv
test-clients: setup-test $(CLIENTS)/done
	@$(BIN)/python -m pytest tests/serve/http/test_clients.py -rs $(ARGS)

$(CLIENTS)/done: requirements/test-clients.in | setup-test
	@$(BIN)/python -m venv $(@D) && $(@D)/bin/pip install -q -r $<
	@scripts/overlay_venv.sh $(@D)/guidellm guidellm==0.8.1
	@if command -v npm >/dev/null; then mkdir -p $(@D)/node && cd $(@D)/node && npm install --silent openai; fi
	@touch $@

lint: setup-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

setup:
	@scripts/setup.sh

setup-test:
	@scripts/setup.sh test

# in a folder of its own, because it shares its import name with our kernels/; without it its tests are skipped
$(HF_KERNELS)/done: requirements/test-hf-kernels.lock | setup-test
	@$(BIN)/python -m pip install --no-deps --upgrade --target $(@D) -r $< >>.venv/setup.log 2>&1 && touch $@ \
		|| echo "setup: Hugging Face's kernels not installed (see .venv/setup.log): its tests will be skipped" >&2

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .ruff_cache
