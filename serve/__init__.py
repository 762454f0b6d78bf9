"""Captions for files: the batch command line, its pipeline, and the language-model engines behind it."""

ENGINES = ("vllm", "transformers", "remote")  # what may run the language model: serve.llm.engine_class
FORMATS = ("jsonl", "txt", "coco", "parquet", "webdataset")  # how captions are written: serve.formats.sink_class
