# make demo: caption the sample images; make test; make lint. Each sets itself up first (PYTHON=... chooses the Python).
BIN := .venv/bin
CAPTION := assets/samples --ckpt assets/vlv-tiny -o out/captions.jsonl --gallery out/gallery.html --no-resume
ARGS :=
JOBS := 2
HF_KERNELS := .venv/hf-kernels
CLIENTS := .venv/clients
ALL := .venv/all
OLDEST := .venv/vllm-0.26
export PYTHON

.PHONY: demo test test-all test-clients test-versions coverage lint setup setup-test clean

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
# Where there is no helm (HELM=/path names one), Helm's library renders the chart. pip has no Chromium, no headers of ONNX
# Runtime: without them (apt-get install chromium libonnxruntime-dev libllama-dev) their tests are skipped
test-all: setup-test $(HF_KERNELS)/done $(CLIENTS)/done $(ALL)/done
	@PATH="$(CURDIR)/$(ALL)/bin:$$PATH" HELM="$${HELM:-$$(command -v helm || echo $(CURDIR)/scripts/helm.py)}" \
		ONNXRUNTIME_WEB="$(CURDIR)/$(ALL)/node/node_modules/onnxruntime-web" $(ALL)/bin/python -m pytest -rs $(ARGS)

$(ALL)/done: requirements/test-all.in | setup-test
	@scripts/overlay_venv.sh $(@D) -r $<
	@version=$$($(BIN)/python -c "from export.edge_bundle.web_page import ORT_WEB; print(ORT_WEB)") && mkdir -p $(@D)/node && \
		if command -v npm >/dev/null; then npm install --silent --prefix $(@D)/node onnxruntime-web@$$version; fi

# make coverage ARGS=tests/serve: what the tests run, commands that they start included
coverage: setup-test $(HF_KERNELS)/done
	@$(BIN)/python -m coverage erase
	@$(BIN)/python -m coverage run -m pytest $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --skip-covered

# other people's clients against the server: LangChain, LiteLLM, LlamaIndex, guidellm, Open WebUI, OpenAI for Node (where
# npm is), vLLM's benchmark; guidellm and Open WebUI need PyTorch, and take that of .venv
test-clients: setup-test $(CLIENTS)/done
	@$(BIN)/python -m pytest tests/serve/http/test_clients.py -rs $(ARGS)

$(CLIENTS)/done: requirements/test-clients.in | setup-test
	@$(BIN)/python -m venv $(@D) && $(@D)/bin/pip install -q -r $<
	@scripts/overlay_venv.sh $(@D)/guidellm guidellm==0.8.1
	@scripts/overlay_venv.sh $(@D)/open-webui open-webui==0.12.4 \
		|| echo "setup: Open WebUI is not installed (it takes Python 3.11 and 3.12): its test will be skipped" >&2
	@if command -v npm >/dev/null; then mkdir -p $(@D)/node && cd $(@D)/node && npm install --silent openai; fi
	@touch $@

# the engine, its placements and the plugin with the newest vLLM, that of .venv, and with the oldest one that is tested;
# 6 GB, since its torch comes with CUDA's libraries; make test-versions JSON=FILE also writes the outcome
test-versions: setup-test $(OLDEST)/done
	@$(BIN)/python scripts/vllm_versions.py $(BIN)/python $(OLDEST)/bin/python $(JSON:%=--json=%) -- $(ARGS)

$(OLDEST)/done: requirements/vllm-0.26.in requirements/gpu.lock | setup-test
	@scripts/overlay_venv.sh $(@D) --no-deps -r $< -c requirements/gpu.lock

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
