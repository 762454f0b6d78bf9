"""Channel attention: within a group, every channel attends to every channel over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, power_of_two, strides, sum_dtype

PROGRAMS = 1024  # about eight for each multiprocessor of the largest GPUs; the tokens are split to get as many


def channel_attention_reference(qkv: Tensor, groups: int) -> Tensor:
    """Return attention between the d channels of each group, with the N tokens as features.

    qkv: [B, N, 3C] packed projections. Returns [B, N, C]. Scores are scaled by N ** -0.5
    (Florence-2's DaViT; Ding et al. 2022, arXiv 2204.03645, section 3.3, scales by the width instead).
    """
    b, n, c3 = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, groups, c3 // 3 // groups).permute(2, 0, 3, 1, 4)  # [B, groups, N, d]
    # the scale goes to the small operand, before the sum over N, which keeps half precision in range
    scores = (q * n**-0.5).transpose(-1, -2) @ k  # [B, groups, d, d]
    out = v @ scores.softmax(-1).transpose(-1, -2)  # [B, groups, N, d]
    return out.transpose(1, 2).reshape(b, n, c3 // 3)


def channel_attention(qkv: Tensor, groups: int) -> Tensor:
    """Compute `channel_attention_reference`, fused on CUDA: q and k are read once, then v once; sums are float32."""
    if fused("channel_attention", qkv, fits=qkv.shape[-1] // 3 // groups <= 128):
        return channel_attention_op(qkv, groups)
    return channel_attention_reference(qkv, groups)


def _splits_and_chunk(b: int, n: int, groups: int) -> tuple[int, int]:
    """Return the number of chunks that the tokens are split into, and a chunk's tokens, a multiple of 256."""
    splits = max(1, cdiv(PROGRAMS, max(1, b * groups)))
    chunk = max(1, cdiv(cdiv(n, splits), 256)) * 256
    return cdiv(n, chunk), chunk


def _launch(kernel: str, x: Tensor, d: int, groups: int, args: dict) -> None:
    """Launch a pass over the tokens of x [B, N, ...] in chunks."""
    batch, tokens, _ = x.shape
    splits, chunk = _splits_and_chunk(batch, tokens, groups)
    launch(
        f"channel_attention.{kernel}",
        f"d{d}",
        lambda meta: (splits, groups, batch),
        {**args, "tokens": tokens, "chunk": chunk},
        {"D": d, "BLOCK_D": power_of_two(d), "DOUBLE": x.dtype == torch.float64},
    )


def _gram(a: Tensor, b: Tensor, b_first: int, channels: int, groups: int) -> Tensor:
    """Return the products a^T b [B, groups, splits, d, d], summed within each chunk of tokens.

    a, b: [B, N, ...], of which the first `channels` channels of a are used, and as many of b from `b_first` on.
    """
    batch, n, _ = a.shape
    d = channels // groups
    splits, _ = _splits_and_chunk(batch, n, groups)
    part = a.new_empty(batch, groups, splits, d, d, dtype=sum_dtype(a))
    args = {"a": a, "b": b, "part": part, "b_first": b_first, **strides("a", a, "bnc"), **strides("b", b, "bnc")}
    _launch("gram", a, d, groups, args)
    return part


def _second_pass(kernel: str, qkv: Tensor, part: Tensor, groups: int, **args: Tensor | int) -> None:
    """Launch the second pass over the tokens, forward or backward."""
    _, n, c3 = qkv.shape
    sizes = {"splits": part.shape[2], "C": c3 // 3, "scale": n**-0.5}
    args = {"qkv": qkv, "part": part, **sizes, **strides("stride", qkv, "bnc"), **args}
    _launch(kernel, qkv, c3 // 3 // groups, groups, args)


@torch.library.custom_op("vlv::channel_attention", mutates_args=())
def channel_attention_op(qkv: Tensor, groups: int) -> Tensor:
    """Return [B, N, C]."""
    out = _fake(qkv, groups)
    if out.numel():
        c = out.shape[-1]
        _second_pass("apply", qkv, _gram(qkv, qkv, c, c, groups), groups, out=out)
    return out


@channel_attention_op.register_fake
def _fake(qkv: Tensor, groups: int) -> Tensor:
    b, n, c3 = qkv.shape
    return qkv.new_empty(b, n, c3 // 3)


@torch.library.custom_op("vlv::channel_attention_backward", mutates_args=())
def channel_attention_backward_op(grad: Tensor, qkv: Tensor, groups: int) -> Tensor:
    """Return the gradient of qkv [B, N, 3C]."""
    grad_qkv = _fake_backward(grad, qkv, groups)
    if grad.numel():
        c = grad.shape[-1]
        grad_part = _gram(grad, qkv, 2 * c, c, groups)
        args = {"grad": grad, "grad_part": grad_part, "grad_qkv": grad_qkv, **strides("grad", grad, "bnc")}
        _second_pass("backward", qkv, _gram(qkv, qkv, c, c, groups), groups, **args)
    return grad_qkv


@channel_attention_backward_op.register_fake
def _fake_backward(grad: Tensor, qkv: Tensor, groups: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.groups = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, grad: Tensor):
    return channel_attention_backward_op(grad, *ctx.saved_tensors, ctx.groups), None


channel_attention_op.register_autograd(_backward, setup_context=_setup_context)
