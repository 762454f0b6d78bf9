"""Captions for files and over HTTP: batch commands and servers, alone or on Ray, and the engines behind them."""

ENGINES = ("vllm", "transformers", "llamacpp", "remote")  # what may run the language model: serve.engines.factory
LLM_DTYPES = ("auto", "float32", "bfloat16", "float16")  # of vLLM's weights
# how captions are written: serve.outputs.factory
FORMATS = ("jsonl", "txt", "coco", "imagefolder", "kohya", "parquet", "webdataset")
# where the encoder runs beside vLLM, and as what its embeddings reach it: docs/captioning.md
PLACEMENTS = ("process", "multimodal", "inline", "engine")
