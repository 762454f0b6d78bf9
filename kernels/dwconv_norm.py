"""Depthwise 3x3 convolution, residual and LayerNorm of a channels-last map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm

from kernels.runtime.dispatch import exporting, fused, needs_gradient
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, power_of_two, strides, sum_dtype
from kernels.runtime.tuning import reference_is_faster

CHUNK = 256  # pixels whose part of a weight's gradient one program sums
CHANNELS = 128  # of the filter's gradient, in one program


def dwconv_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return y = x + conv(x) and LayerNorm(y), each [B, H, W, C].

    x: [B, H, W, C]; weight: [C, 1, 3, 3]; the others [C]. The border is padded with zeros.
    """
    y = conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1) + x
    return y, layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)


def dwconv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `dwconv_norm_reference` of x, or of x + residual, fused on CUDA: maps are read once and written twice."""
    if residual is not None:
        if adds_residual(x, residual):
            return add_dwconv_norm_op(x, residual, weight, bias, norm_weight, norm_bias, eps)
        x = x + residual
    c = x.shape[-1]
    if fused("dwconv_norm", x, weight, bias, norm_weight, norm_bias, fits=c <= 4096) and not reference_is_faster(
        "dwconv_norm", f"c{c}", x
    ):
        return dwconv_norm_op(x, weight, bias, norm_weight, norm_bias, eps)
    return dwconv_norm_reference(x, weight, bias, norm_weight, norm_bias, eps)


def adds_residual(x: Tensor, residual: Tensor) -> bool:
    """Return True if one kernel computes x + residual and what follows: for inference, with contiguous maps."""
    return (
        not needs_gradient(x, residual)
        and not exporting()
        and x.is_contiguous()
        and residual.is_contiguous()
        and x.dtype == residual.dtype
        and fused("dwconv_norm", x, residual, fits=x.shape[-1] <= 4096)
        and not reference_is_faster("dwconv_norm", f"c{x.shape[-1]}", x)
    )


def _grid(meta: dict, height: int, width: int, batch: int) -> tuple[int, int, int]:
    """Return the blocks of each design of kernels/triton/dwconv_norm.py."""
    if meta["DESIGN"] == 0:
        return cdiv(height * width, meta["TILE"]), 1, batch
    along, across = (height, width) if meta["DESIGN"] == 1 else (width, height)
    return cdiv(across, meta["TILE"]), cdiv(along, meta["LINES"]), batch


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    flip: bool = False,
    norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y and LayerNorm(y). Without `norm`, neither bias nor LayerNorm; `flip` turns the filter by 180 degrees."""
    b, h, w, c = x.shape
    y = x.new_empty(b, h, w, c)
    normed = x.new_empty(b, h, w, c) if norm else y
    vectors = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    args = {
        "x": x,
        "residual": x if residual is None else residual,
        **{name: vector.contiguous() for name, vector in vectors.items()},
        "y": y,
        "normed": normed,
    }
    launch(
        "dwconv_norm.forward",
        f"c{c}",
        lambda meta: _grid(meta, h, w, b),
        {**args, "height": h, "width": w, **strides("stride", x, "bhwc"), "eps": eps},
        {
            "C": c,
            "BLOCK_C": power_of_two(c),
            "FLIP": flip,
            "NORM": norm,
            "RESIDUAL": residual is not None,
            "DOUBLE": x.dtype == torch.float64,
        },
    )
    return y, normed


@torch.library.custom_op("vlv::dwconv_norm", mutates_args=())
def dwconv_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y and LayerNorm(y), each [B, H, W, C]."""
    return _launch(x, weight, bias, norm_weight, norm_bias, eps)


@dwconv_norm_op.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("vlv::add_dwconv_norm", mutates_args=())
def add_dwconv_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y and LayerNorm(y) of the map x + residual, for inference."""
    return _launch(x, weight, bias, norm_weight, norm_bias, eps, residual)


@add_dwconv_norm_op.register_fake
def _fake_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("vlv::dwconv_norm_backward", mutates_args=())
def dwconv_norm_backward_op(
    grad_y: Tensor, grad_normed: Tensor, x: Tensor, y: Tensor, weight: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, norm_weight and norm_bias."""
    b, h, w, c = x.shape
    pixels = b * h * w
    dtype = sum_dtype(x)
    grad_sum = x.new_empty(x.shape)
    sums = x.new_empty(cdiv(pixels, CHUNK), 3, c, dtype=dtype)
    constants = {"C": c, "BLOCK_C": power_of_two(c), "DOUBLE": dtype == torch.float64}
    grads = {"y": y, "grad_y": grad_y.contiguous(), "grad_normed": grad_normed.contiguous()}
    launch(
        "dwconv_norm.norm_backward",
        f"c{c}",
        lambda meta: (cdiv(pixels, CHUNK),),
        {
            **grads,
            "norm_weight": norm_weight.contiguous(),
            "grad_sum": grad_sum,
            "part": sums,
            "pixels": pixels,
            "chunk": CHUNK,
            "eps": eps,
        },
        constants,
    )
    taps = x.new_empty(b, cdiv(h * w, CHUNK), c, 9, dtype=dtype)
    args = {"x": x, "grad_sum": grad_sum, "part": taps, "height": h, "width": w, "chunk": CHUNK}
    launch(
        "dwconv_norm.weight_backward",
        f"c{c}",
        lambda meta: (cdiv(h * w, CHUNK), cdiv(c, meta["BLOCK_C"]), b),
        {**args, **strides("stride", x, "bhwc")},
        {**constants, "BLOCK_C": min(CHANNELS, power_of_two(c))},
    )
    # the gradient of x is a convolution plus its own input too, with the filter turned by 180 degrees
    grad_x, _ = _launch(grad_sum, weight, norm_weight, norm_weight, norm_weight, eps, flip=True, norm=False)
    norm_weight_sum, norm_bias_sum, bias_sum = sums.sum(0).to(weight.dtype).unbind(0)
    grad_weight = taps.sum((0, 1)).view(weight.shape).to(weight.dtype)
    return grad_x, grad_weight, bias_sum.clone(), norm_weight_sum.clone(), norm_bias_sum.clone()


@dwconv_norm_backward_op.register_fake
def _fake_backward(
    grad_y: Tensor, grad_normed: Tensor, x: Tensor, y: Tensor, weight: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = [weight.new_empty(weight.shape[0]) for _ in range(3)]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *vectors


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, norm_weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, output[0], weight, norm_weight)


def _backward(ctx, grad_y: Tensor, grad_normed: Tensor):
    return *dwconv_norm_backward_op(grad_y, grad_normed, *ctx.saved_tensors, ctx.eps), None


dwconv_norm_op.register_autograd(_backward, setup_context=_setup_context)
