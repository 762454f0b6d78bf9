"""Captions for files and over HTTP: batch commands and servers, alone or on Ray, and the engines behind them."""

ENGINES = ("vllm", "transformers", "remote")  # what may run the language model: serve.engines.base.engine_class
# how captions are written: serve.outputs.formats.sink_class
FORMATS = ("jsonl", "txt", "coco", "parquet", "webdataset")
