"""Gated GELU (Shazeer 2020, arXiv 2002.05202), the activation of a UNet's transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv
from kernels.runtime.tuning import reference_is_faster


def geglu_reference(x: Tensor) -> Tensor:
    """Return the first half times the exact GELU of the second: [..., 2F] -> [..., F]."""
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


def geglu(x: Tensor) -> Tensor:
    """Compute `geglu_reference`, fused on CUDA: one read, one write. The kernel has no gradient."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    if not needs_gradient and fused("geglu", x) and not reference_is_faster("geglu", f"f{x.shape[-1] // 2}", x):
        return geglu_op(x)
    return geglu_reference(x)


def _launch(x: Tensor, out: Tensor) -> None:
    rows, width = x.reshape(-1, x.shape[-1]), out.shape[-1]
    args = {"x": rows, "out": out, "width": width, "row_stride": rows.stride(0), "column_stride": rows.stride(1)}
    launch(
        "geglu.forward",
        f"f{width}",
        lambda meta: (len(rows), cdiv(width, meta["BLOCK"])),
        args,
        {"DOUBLE": x.dtype == torch.float64},
    )


@torch.library.custom_op("vlv::geglu", mutates_args=())
def geglu_op(x: Tensor) -> Tensor:
    """Return [..., F]."""
    out = _fake(x)
    _launch(x, out)
    return out


@geglu_op.register_fake
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
