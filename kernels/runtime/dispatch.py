"""Decide where an operation runs: its fused kernel on CUDA, its plain PyTorch reference everywhere else.

VLV_KERNELS in the environment, read once at import:
    auto        (default) Triton's kernels for CUDA tensors; the references for all others, and while exporting
    reference   the references everywhere
    interpret   the kernels for CPU tensors too, in Triton's interpreter (for tests; slow). TRITON_INTERPRET=1
                alone does the same
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

MODES = ("auto", "reference", "interpret")
MODE = os.environ.get("VLV_KERNELS", "auto")
if MODE not in MODES:
    raise ValueError(f"VLV_KERNELS is {MODE!r}, expected one of {', '.join(MODES)}")
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined
INTERPRET = MODE != "reference" and os.environ.get("TRITON_INTERPRET") == "1"
AOT_FOLDER = os.environ.get("VLV_KERNELS_AOT")  # builds of kernels.aot, for a machine without Triton
_enabled = MODE != "reference" and (AOT_FOLDER is not None or find_spec("triton") is not None)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_as_nodes = False


def fused(x: Tensor, *others: Tensor) -> bool:
    """Return True if the fused kernel should run. Traceable; the answer is a constant of the graph."""
    if torch.compiler.is_exporting():
        return _as_nodes and x.dtype in _DTYPES
    if not _enabled:
        return False
    if x.device.type == "cpu":  # float64 only here: gradcheck asks for it, and GPUs have no use for it
        usable = INTERPRET and x.dtype in (*_DTYPES, torch.float64)
    else:
        usable = x.device.type == "cuda" and x.dtype in _DTYPES
    return usable and all(other.device == x.device for other in others)


@contextmanager
def references() -> Iterator[None]:
    """Run every operation by its reference, which a kernel is compared with."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@contextmanager
def as_nodes() -> Iterator[None]:
    """Keep the operations as nodes of an exported graph (kernels.tensorrt.onnx_nodes) where a kernel could run them."""
    global _as_nodes
    before, _as_nodes = _as_nodes, True
    try:
        yield
    finally:
        _as_nodes = before
