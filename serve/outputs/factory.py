"""Choose an output format by its word."""

from __future__ import annotations

from serve.outputs.formats import CocoSink, ImageFolderSink, KohyaSink, ParquetSink, SidecarSink
from serve.outputs.jsonl import FileSink, SinkError
from serve.outputs.webdataset import WebDatasetSink

CLASSES = {
    "jsonl": FileSink,
    "txt": SidecarSink,
    "coco": CocoSink,
    "imagefolder": ImageFolderSink,
    "kohya": KohyaSink,
    "parquet": ParquetSink,
    "webdataset": WebDatasetSink,
}


def sink_class(word: str) -> type[FileSink]:
    """Return the sink class of one of serve.FORMATS. Raises SinkError if a package for it is not installed."""
    if word == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError as error:
            raise SinkError("--format parquet needs pyarrow: python -m pip install pyarrow") from error
    return CLASSES[word]
