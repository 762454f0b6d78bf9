"""Open a runtime by its word; only the chosen one's library is imported."""

from __future__ import annotations

import importlib
from pathlib import Path

from export.components import RUNTIMES
from export.runtimes.base import EncoderRuntime, RuntimeUnavailable
from vlv.checkpoints.folder import Checkpoint

CLASSES = {
    "torch": ("export.runtimes.torch", "TorchRuntime"),
    "onnx": ("export.runtimes.onnxruntime", "OrtRuntime"),
    "onnx-cuda": ("export.runtimes.onnxruntime", "OrtCudaRuntime"),
    "onnx-trt": ("export.runtimes.onnxruntime", "OrtTensorRTRuntime"),
    "trt": ("export.runtimes.tensorrt", "TrtRuntime"),
    "rtx": ("export.runtimes.tensorrt", "RtxRuntime"),
}


def open_runtime(
    word: str,
    artifacts: str | Path | None = None,
    checkpoint: Checkpoint | None = None,
    precision: str | None = None,
    graphs: int = 0,
) -> EncoderRuntime:
    """Return the runtime of a word of RUNTIMES; precision and graphs are TorchRuntime's, and others have none.

    Raises ValueError, ArtifactError, or RuntimeUnavailable.
    """
    if word not in RUNTIMES:
        raise ValueError(f"no runtime {word!r}; there are {', '.join(RUNTIMES)}")
    if word == "torch" and checkpoint is None:
        raise ValueError("the runtime torch runs a checkpoint: name one")
    if word != "torch" and artifacts is None:
        raise ValueError(f"the runtime {word} runs exported artifacts: name their folder")
    if word != "torch" and precision:
        raise ValueError(f"the runtime {word} has the precision of its artifacts, not {precision}: export them with it")
    module, name = CLASSES[word]
    try:
        kind = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in ("onnxruntime", "onnx"):
            raise
        raise RuntimeUnavailable(
            f"{error.name} is not installed: python -m pip install --no-deps -r requirements/cpu.lock"
        ) from error
    if word == "torch":
        return kind(checkpoint, precision=precision, graphs=graphs)
    return kind(artifacts, checkpoint)
