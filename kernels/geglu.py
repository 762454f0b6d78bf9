"""Gated GELU (Shazeer 2020, arXiv 2002.05202), the activation of a UNet's transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch


def geglu_reference(x: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: the first half times the exact GELU of the second."""
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


def geglu(x: Tensor) -> Tensor:
    """`geglu_reference`, fused on CUDA: one read, one write. The kernel has no gradient."""
    if fused(x) and not (torch.is_grad_enabled() and x.requires_grad):
        return geglu_op(x)
    return geglu_reference(x)


@torch.library.custom_op("vlv::geglu", mutates_args=())
def geglu_op(x: Tensor) -> Tensor:
    out = _half(x)
    rows = x.reshape(-1, x.shape[-1])
    launch(
        "geglu.forward", f"f{out.shape[-1]}", ("rows", "cdiv(width, BLOCK)"),
        {"x": rows, "out": out, "width": out.shape[-1], "row_stride": rows.stride(0), "column_stride": rows.stride(1)},
        {"DOUBLE": x.dtype == torch.float64}, rows=len(rows),
    )  # fmt: skip
    return out


@geglu_op.register_fake
def _half(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
