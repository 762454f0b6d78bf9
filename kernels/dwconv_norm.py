"""Depthwise 3x3 convolution, residual and LayerNorm of a channels-last map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import power_of_two, strides, sum_dtype

CHUNK = 256  # pixels whose share of a weight's gradient one program sums
CHANNELS = 128  # of the filter's gradient, in one program


def dwconv_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The convolved map plus itself, and its LayerNorm: (y, norm(y)), each [B, H, W, C].

    x: [B, H, W, C]; weight: [C, 1, 3, 3]; the others [C]. The border is padded with zeros.
    """
    y = conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1) + x
    return y, layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)


def dwconv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`dwconv_norm_reference`, fused on CUDA: the map is read once and written twice."""
    if fused(x, weight, bias, norm_weight, norm_bias) and x.shape[-1] <= 4096:
        return dwconv_norm_op(x, weight, bias, norm_weight, norm_bias, eps)
    return dwconv_norm_reference(x, weight, bias, norm_weight, norm_bias, eps)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, flip: bool, norm: bool
) -> tuple[Tensor, Tensor]:
    b, h, w, c = x.shape
    y = x.new_empty(b, h, w, c)
    normed = x.new_empty(b, h, w, c) if norm else y
    launch(
        "dwconv_norm.forward", f"c{c}", ("cdiv(height * width, TILE)", "batch"),
        {
            "x": x, "weight": weight.contiguous(), "bias": bias.contiguous(), "norm_weight": norm_weight.contiguous(),
            "norm_bias": norm_bias.contiguous(), "y": y, "normed": normed, "height": h, "width": w,
            **strides("stride", x, "bhwc"), "eps": eps,
        },
        {
            "C": c, "BLOCK_C": power_of_two(c), "FLIP": flip, "NORM": norm, "DOUBLE": x.dtype == torch.float64,
        },
        batch=b,
    )  # fmt: skip
    return y, normed


@torch.library.custom_op("vlv::dwconv_norm", mutates_args=())
def dwconv_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _convolve(x, weight, bias, norm_weight, norm_bias, eps, flip=False, norm=True)


@dwconv_norm_op.register_fake
def _two_maps(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("vlv::dwconv_norm_backward", mutates_args=())
def dwconv_norm_backward_op(
    grad_y: Tensor, grad_normed: Tensor, x: Tensor, y: Tensor, weight: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias, norm_weight and norm_bias."""
    b, h, w, c = x.shape
    wide = sum_dtype(x)
    grad_sum = x.new_empty(x.shape)
    sums = x.new_empty(-(-b * h * w // CHUNK), 3, c, dtype=wide)
    constants = {"C": c, "BLOCK_C": power_of_two(c), "DOUBLE": wide == torch.float64}
    launch(
        "dwconv_norm.norm_backward", f"c{c}", ("cdiv(pixels_total, chunk)",),
        {
            "y": y, "grad_y": grad_y.contiguous(), "grad_normed": grad_normed.contiguous(),
            "norm_weight": norm_weight.contiguous(), "grad_sum": grad_sum, "part": sums, "pixels_total": b * h * w,
            "chunk": CHUNK, "eps": eps,
        },
        constants,
    )  # fmt: skip
    taps = x.new_empty(b, -(-h * w // CHUNK), c, 9, dtype=wide)
    launch(
        "dwconv_norm.weight_backward", f"c{c}", ("cdiv(height * width, chunk)", "cdiv(C, BLOCK_C)", "batch"),
        {
            "x": x, "grad_sum": grad_sum, "part": taps, "height": h, "width": w, "chunk": CHUNK,
            **strides("stride", x, "bhwc"),
        },
        {**constants, "BLOCK_C": min(CHANNELS, power_of_two(c))}, batch=b,
    )  # fmt: skip
    # the gradient of x is a convolution plus its own input too, with the filter turned round
    grad_x, _ = _convolve(grad_sum, weight, norm_weight, norm_weight, norm_weight, eps, flip=True, norm=False)
    norm_weight_sum, norm_bias_sum, bias_sum = sums.sum(0).to(weight.dtype).unbind(0)
    grad_weight = taps.sum((0, 1)).view(weight.shape).to(weight.dtype)
    return grad_x, grad_weight, bias_sum.clone(), norm_weight_sum.clone(), norm_bias_sum.clone()


@dwconv_norm_backward_op.register_fake
def _like_parameters(
    grad_y: Tensor, grad_normed: Tensor, x: Tensor, y: Tensor, weight: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = [weight.new_empty(weight.shape[0]) for _ in range(3)]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *vectors


def _setup(ctx, inputs, output) -> None:
    x, weight, _, norm_weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, output[0], weight, norm_weight)


def _backward(ctx, grad_y: Tensor, grad_normed: Tensor):
    return *dwconv_norm_backward_op(grad_y, grad_normed, *ctx.saved_tensors, ctx.eps), None


dwconv_norm_op.register_autograd(_backward, setup_context=_setup)
