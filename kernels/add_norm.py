"""Sum followed by LayerNorm: residuals and positions in BART and CLIP, and a residual before DaViT's next stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from kernels.runtime.dispatch import exporting, fused, needs_gradient
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, power_of_two


def add_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return x + residual and its LayerNorm, each [..., C]; weight, bias: [C]; the shapes of the terms broadcast."""
    y = x + residual
    return y, layer_norm(y, y.shape[-1:], weight, bias, eps)


def add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm, keep_sum: bool = True) -> tuple[Tensor, Tensor]:
    """Compute `add_norm_reference`, fused on CUDA for inference: both are read once, the sum is never read again.

    Without `keep_sum`, the first result means nothing: the kernel does not write it.
    """
    if fuses(x, residual, norm):
        large, small = (x, residual) if _repeats(residual, x) else (residual, x)
        return add_norm_op(large, small, norm.weight, norm.bias, norm.eps, keep_sum)
    return add_norm_reference(x, residual, norm.weight, norm.bias, norm.eps)


def fuses(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> bool:
    """Return True if `add_norm` of these runs the kernel: for inference, with contiguous tensors of one dtype."""
    return (
        not needs_gradient(x, residual, norm.weight, norm.bias)
        and not exporting()
        and x.dtype == residual.dtype
        and x.is_contiguous()
        and residual.is_contiguous()
        and (_repeats(residual, x) or _repeats(x, residual))
        and fused("add_norm", x, residual, norm.weight, norm.bias, fits=x.shape[-1] <= 2**14)
    )


def _repeats(small: Tensor, large: Tensor) -> bool:
    """Return True if `small` is added to each part of `large` of its shape, leading ones apart: [N, C] to [B, N, C]."""
    shape = small.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return small.ndim <= large.ndim and large.shape[-len(shape) :] == shape


@torch.library.custom_op("vlv::add_norm", mutates_args=())
def add_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    """Return x + residual (empty without `keep_sum`) and its LayerNorm, of contiguous x [..., C].

    residual: like x, or fewer rows [N, C], added to every N rows of x.
    """
    y, normed = _fake(x, residual, weight, bias, eps, keep_sum)
    c = x.shape[-1]
    rows, period = x.numel() // c, residual.numel() // c
    args = {"x": x, "residual": residual, "weight": weight.contiguous(), "bias": bias.contiguous()}
    launch(
        "add_norm.forward",
        f"c{c}",
        lambda meta: (cdiv(rows, meta["ROWS"]),),
        {**args, "y": y if keep_sum else normed, "normed": normed, "rows": rows, "period": period, "eps": eps},
        {
            "C": c,
            "BLOCK": power_of_two(c),
            "REPEATS": period < rows,
            "KEEP_SUM": keep_sum,
            "DOUBLE": x.dtype == torch.float64,
        },
    )
    return y, normed


@add_norm_op.register_fake
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if keep_sum else 0), x.new_empty(x.shape)
