"""Channel attention: within a group, every channel attends to every channel over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import power_of_two, strides, sum_dtype

PROGRAMS = 1024  # about eight for each multiprocessor of the largest GPUs; the tokens are split to get as many


def channel_attention_reference(qkv: Tensor, groups: int) -> Tensor:
    """Attention between the d channels of each group, with the N tokens as features.

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
    """`channel_attention_reference`, fused on CUDA: q and k are read once, then v once; sums are float32."""
    if fused(qkv) and qkv.shape[-1] // 3 // groups <= 128:
        return channel_attention_op(qkv, groups)
    return channel_attention_reference(qkv, groups)


def splits_and_chunk(b: int, n: int, groups: int) -> tuple[int, int]:
    """Into how many chunks the tokens are split, and the tokens of a chunk, a multiple of 256."""
    splits = max(1, -(-PROGRAMS // max(1, b * groups)))
    chunk = max(1, -(-n // splits // 256)) * 256
    return -(-n // chunk), chunk


def _gram(a: Tensor, b: Tensor, b_first: int, channels: int, groups: int) -> Tensor:
    """Products a^T b [B, groups, splits, d, d], summed within each chunk of tokens.

    a, b: [B, N, …], of which the first `channels` of a count, and as many of b from `b_first` on.
    """
    batch, n, _ = a.shape
    d = channels // groups
    splits, chunk = splits_and_chunk(batch, n, groups)
    part = a.new_empty(batch, groups, splits, d, d, dtype=sum_dtype(a))
    launch(
        "channel_attention.gram", f"d{d}", ("splits", "groups", "batch"),
        {
            "a": a, "b": b, "part": part, "tokens": n, "chunk": chunk, "b_first": b_first,
            **strides("a", a, "bnc"), **strides("b", b, "bnc"),
        },
        {"D": d, "BLOCK_D": power_of_two(d), "DOUBLE": a.dtype == torch.float64},
        splits=splits, groups=groups, batch=batch,
    )  # fmt: skip
    return part


def _pass(kernel: str, qkv: Tensor, part: Tensor, groups: int, **more: Tensor | int) -> None:
    """The second pass over the tokens, forward or backward."""
    b, n, c3 = qkv.shape
    d = c3 // 3 // groups
    splits, chunk = splits_and_chunk(b, n, groups)
    launch(
        f"channel_attention.{kernel}", f"d{d}", ("splits", "groups", "batch"),
        {
            "qkv": qkv, "part": part, "tokens": n, "chunk": chunk, "splits": splits, "C": c3 // 3,
            **strides("stride", qkv, "bnc"), "scale": n**-0.5, **more,
        },
        {"D": d, "BLOCK_D": power_of_two(d), "DOUBLE": qkv.dtype == torch.float64},
        groups=groups, batch=b,
    )  # fmt: skip


@torch.library.custom_op("vlv::channel_attention", mutates_args=())
def channel_attention_op(qkv: Tensor, groups: int) -> Tensor:
    out = _like_tokens(qkv, groups)
    if out.numel():
        c = out.shape[-1]
        _pass("apply", qkv, _gram(qkv, qkv, c, c, groups), groups, out=out)
    return out


@channel_attention_op.register_fake
def _like_tokens(qkv: Tensor, groups: int) -> Tensor:
    b, n, c3 = qkv.shape
    return qkv.new_empty(b, n, c3 // 3)


@torch.library.custom_op("vlv::channel_attention_backward", mutates_args=())
def channel_attention_backward_op(grad: Tensor, qkv: Tensor, groups: int) -> Tensor:
    grad_qkv = _like_qkv(grad, qkv, groups)
    if grad.numel():
        c = grad.shape[-1]
        grad_part = _gram(grad, qkv, 2 * c, c, groups)
        more = {"grad": grad, "grad_part": grad_part, "grad_qkv": grad_qkv, **strides("grad", grad, "bnc")}
        _pass("backward", qkv, _gram(qkv, qkv, c, c, groups), groups, **more)
    return grad_qkv


@channel_attention_backward_op.register_fake
def _like_qkv(grad: Tensor, qkv: Tensor, groups: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.groups = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, grad: Tensor):
    return channel_attention_backward_op(grad, *ctx.saved_tensors, ctx.groups), None


channel_attention_op.register_autograd(_backward, setup_context=_setup)
