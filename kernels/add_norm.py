"""Residual sum followed by LayerNorm, as the layers of BART and CLIP have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from kernels.runtime.dispatch import exporting, fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, power_of_two


def add_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return x + residual and its LayerNorm, each [..., C]; weight, bias: [C]."""
    y = x + residual
    return y, layer_norm(y, y.shape[-1:], weight, bias, eps)


def add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm, keep_sum: bool = True) -> tuple[Tensor, Tensor]:
    """Compute `add_norm_reference`, fused on CUDA for inference: both are read once, the sum is never read again.

    Without `keep_sum`, the first result means nothing: the kernel does not write it.
    """
    c = x.shape[-1]
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, norm.weight, norm.bias))
    if (
        not needs_gradient
        and not exporting()
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and x.is_contiguous()
        and residual.is_contiguous()
        and fused("add_norm", x, residual, norm.weight, norm.bias, fits=c <= 2**14)
    ):
        return add_norm_op(x, residual, norm.weight, norm.bias, norm.eps, keep_sum)
    return add_norm_reference(x, residual, norm.weight, norm.bias, norm.eps)


@torch.library.custom_op("vlv::add_norm", mutates_args=())
def add_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    """Return x + residual (empty without `keep_sum`) and its LayerNorm, of contiguous x and residual [..., C]."""
    y, normed = _fake(x, residual, weight, bias, eps, keep_sum)
    c = x.shape[-1]
    rows = x.numel() // c
    args = {"x": x, "residual": residual, "weight": weight.contiguous(), "bias": bias.contiguous()}
    launch(
        "add_norm.forward",
        f"c{c}",
        lambda meta: (cdiv(rows, meta["ROWS"]),),
        {**args, "y": y if keep_sum else normed, "normed": normed, "rows": rows, "eps": eps},
        {"C": c, "BLOCK": power_of_two(c), "KEEP_SUM": keep_sum, "DOUBLE": x.dtype == torch.float64},
    )
    return y, normed


@add_norm_op.register_fake
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if keep_sum else 0), x.new_empty(x.shape)
