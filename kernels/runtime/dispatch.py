"""Decide where an operation runs: its fused kernel on CUDA, its plain PyTorch reference everywhere else.

VLV_KERNELS in the environment, read once at import:
    auto        (default) Triton's kernels for CUDA tensors; the references for all others, and while exporting
    reference   the references everywhere
    interpret   the kernels for CPU tensors too, in Triton's interpreter (for tests; slow). TRITON_INTERPRET=1
                alone does the same
"""

from __future__ import annotations

import os
import warnings
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
_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_comparing = 0  # depth of references()
_as_nodes = False
_warned: set[str] = set()


def fused(op: str, x: Tensor, *others: Tensor, fits: bool = True) -> bool:
    """Return True if the fused kernel of `op` should run. Traceable; the answer is a constant of the graph.

    fits: False where the kernel does not take these sizes. On CUDA, a reference warns once for each reason.
    """
    if exporting():
        return _as_nodes and fits and x.dtype in _DTYPES
    if x.device.type == "cpu":  # float64 only here, for gradcheck
        usable = INTERPRET and not _comparing and fits and x.dtype in (*_DTYPES, torch.float64)
        return usable and all(other.device == x.device for other in others)
    if x.device.type != "cuda" or _comparing:
        return False
    reason = _reason(x, others, fits)
    if reason:
        _warn(op, reason)
    return not reason


def _reason(x: Tensor, others: tuple[Tensor, ...], fits: bool) -> str:
    """Return why the kernel cannot run on CUDA tensors; "" if it can."""
    if MODE == "reference":
        return "VLV_KERNELS=reference turns the kernels off"
    if AOT_FOLDER is None and not _HAS_TRITON:
        return "Triton is not installed: pip install triton, or set VLV_KERNELS_AOT to builds of kernels.aot"
    if x.dtype not in _DTYPES:
        return f"no kernel computes in {x.dtype}: use float32, float16 or bfloat16"
    if any(other.device != x.device for other in others):
        return f"its tensors lie on several devices, expected all on {x.device}"
    return "" if fits else "no kernel takes these sizes"


def needs_gradient(*tensors: Tensor) -> bool:
    """Return True if a gradient of one of these is recorded; a kernel without a backward then gives way."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _constant(function):
    """Let Dynamo call `function` while it traces, and take its result as a constant of the graph.

    This is what torch.compiler.assume_constant_result sets, without the second that importing its compiler takes.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def exporting() -> bool:
    """Return True if a graph is exported.

    Dynamo must not trace this: torch 2.11's takes torch.compiler.is_exporting for True inside torch.compile as well.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@_constant
def _warn(op: str, reason: str) -> None:
    """Warn once for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{op} runs on its slower PyTorch reference on this GPU: {reason}", RuntimeWarning, stacklevel=3)


@contextmanager
def references() -> Iterator[None]:
    """Run every operation by its reference, which a kernel is compared with."""
    global _comparing
    _comparing += 1
    try:
        yield
    finally:
        _comparing -= 1


@contextmanager
def as_nodes() -> Iterator[None]:
    """Keep the operations as nodes of an exported graph (kernels.tensorrt.onnx_nodes) where a kernel could run them."""
    global _as_nodes
    before, _as_nodes = _as_nodes, True
    try:
        yield
    finally:
        _as_nodes = before
