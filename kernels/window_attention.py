"""Attention within windows, read directly from the QKV map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import LOG2_E, cdiv, power_of_two, strides, sum_dtype, two_blocks


def window_attention_reference(qkv: Tensor, bias: Tensor, heads: int, window: int) -> Tensor:
    """Return multi-head self-attention within non-overlapping windows.

    qkv: [B, H, W, 3C], the packed projections of the map's tokens, `bias` included; bias: [3C].
    Returns [B, H, W, C]. A map whose size is no multiple of the window is padded at the bottom and right
    with tokens of value zero *before* the projection, so their QKV is the bias, and they take part
    in the softmax (Florence-2, modeling_florence2.py: WindowAttention).
    """
    b, h, w, c3 = qkv.shape
    rows, columns = -(-h // window), -(-w // window)
    if (rows * window, columns * window) != (h, w):
        padded = bias.to(qkv.dtype).expand(b, rows * window, columns * window, c3).clone()
        padded[:, :h, :w] = qkv
        qkv = padded
    # [B, rows, window, columns, window, 3, heads, d] -> [3, B * rows * columns, heads, window², d]
    split = qkv.reshape(b, rows, window, columns, window, 3, heads, c3 // 3 // heads)
    q, k, v = split.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
        3, b * rows * columns, heads, window * window, c3 // 3 // heads
    )
    out = scaled_dot_product_attention(q, k, v)
    out = out.reshape(b, rows, columns, heads, window, window, c3 // 3 // heads).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(b, rows * window, columns * window, c3 // 3)[:, :h, :w]


def window_attention(qkv: Tensor, bias: Tensor, heads: int, window: int) -> Tensor:
    """Compute `window_attention_reference`, fused on CUDA: the map is not copied, and padding is never stored."""
    fits = 16 <= qkv.shape[-1] // 3 // heads <= 128 and 4 <= window <= 16
    if fused("window_attention", qkv, bias, fits=fits):
        return window_attention_op(qkv, bias, heads, window)
    return window_attention_reference(qkv, bias, heads, window)


def _windows(height: int, width: int, window: int) -> int:
    """Return the number of windows of a map."""
    return cdiv(height, window) * cdiv(width, window)


def _grid(meta: dict, windows: int, heads: int, batch: int) -> tuple[int, int, int]:
    """Return the blocks of each design of kernels/triton/window_attention.py."""
    design = meta.get("DESIGN", 0)
    if design in (1, 2):
        return windows * cdiv(heads, meta["GROUP"]), 1, batch
    return cdiv(windows, 2) if design == 3 else windows, heads, batch


def _launch(kernel: str, qkv: Tensor, bias: Tensor, heads: int, window: int, args: dict, **constants: bool) -> None:
    b, h, w, c3 = qkv.shape
    head_dim = c3 // 3 // heads
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim), "WINDOW": window}
    launch(
        f"window_attention.{kernel}",
        f"w{window}d{head_dim}",
        lambda meta: _grid(meta, _windows(h, w, window), heads, b),
        {
            "qkv": qkv,
            "bias": bias.contiguous(),
            "height": h,
            "width": w,
            "C": c3 // 3,
            **strides("stride", qkv, "bhwc"),
            **args,
        },
        {**shape, "PADDED": bool(h % window or w % window), **two_blocks(window**2), **constants},
    )


@torch.library.custom_op("vlv::window_attention", mutates_args=())
def window_attention_op(qkv: Tensor, bias: Tensor, heads: int, window: int) -> Tensor:
    """Return [B, H, W, C]."""
    out = _fake(qkv, bias, heads, window)
    args = {"out": out, "scale": (qkv.shape[-1] // 3 // heads) ** -0.5 * LOG2_E}
    _launch("forward", qkv, bias, heads, window, args)
    return out


@window_attention_op.register_fake
def _fake(qkv: Tensor, bias: Tensor, heads: int, window: int) -> Tensor:
    b, h, w, c3 = qkv.shape
    return qkv.new_empty(b, h, w, c3 // 3)


@torch.library.custom_op("vlv::window_attention_backward", mutates_args=())
def window_attention_backward_op(
    grad: Tensor, qkv: Tensor, bias: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv, and of the bias as far as it stands for padding."""
    b, h, w, c3 = qkv.shape
    padded = bool(h % window or w % window)
    grad_qkv = qkv.new_empty(qkv.shape)
    # each window's part, summed below in a fixed order
    padding = qkv.new_zeros(b * _windows(h, w, window) if padded else 1, c3 // 3 * 2, dtype=sum_dtype(qkv))
    args = {"grad": grad, "grad_qkv": grad_qkv, "padding": padding, "scale": (c3 // 3 // heads) ** -0.5}
    args |= strides("grad", grad, "bhwc")
    _launch("backward", qkv, bias, heads, window, args, DOUBLE=qkv.dtype == torch.float64)
    return grad_qkv, torch.cat([bias.new_zeros(c3 // 3), padding.sum(0).to(bias.dtype)])


@window_attention_backward_op.register_fake
def _fake_backward(grad: Tensor, qkv: Tensor, bias: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, ctx.heads, ctx.window = inputs
    ctx.save_for_backward(qkv, bias)


def _backward(ctx, grad: Tensor):
    return *window_attention_backward_op(grad, *ctx.saved_tensors, ctx.heads, ctx.window), None, None


window_attention_op.register_autograd(_backward, setup_context=_setup_context)
