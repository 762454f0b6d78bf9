"""Attention of many queries to a short context whose keys and values are given, such as a UNet's 77 tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.runtime.dispatch import fused, needs_gradient
from kernels.runtime.launch import launch
from kernels.runtime.tiles import LOG2_E, cdiv, power_of_two, strides, two_blocks
from kernels.runtime.tuning import reference_is_faster

MAX_KEYS = 160  # that fit on the chip beside the queries


def cross_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v of each head: q [B, M, heads, d]; k, v [B, N, heads, d] -> [B, M, heads, d].

    The heads follow the tokens, as a projection leaves them, so nothing need be transposed.
    """
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `cross_attention_reference`, fused on CUDA for up to 160 keys. The kernel has no gradient."""
    batch, m, heads, d = q.shape
    n = k.shape[1]
    # the kernel does not broadcast batches or heads, as the reference does
    fits = 16 <= d <= 256 and 0 < n <= MAX_KEYS and k.shape == v.shape == (batch, n, heads, d)
    if (
        not needs_gradient(q, k, v)
        and fused("cross_attention", q, k, v, fits=fits)
        and not reference_is_faster("cross_attention", f"m{m}n{n}d{d}", q)
    ):
        return cross_attention_op(q, k, v)
    return cross_attention_reference(q, k, v)


def _launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    batch, queries, heads, head_dim = q.shape
    args = {"q": q, "k": k, "v": v, "out": out, "queries": queries, "row": heads * head_dim}
    for name, x in (("q", q), ("k", k), ("v", v)):
        args |= strides(name, x, "bnhd")
    args["scale"] = head_dim**-0.5 * LOG2_E
    constants = {"KEYS": k.shape[1], "HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim)}
    launch(
        "cross_attention.forward",
        f"n{k.shape[1]}d{head_dim}",
        lambda meta: (cdiv(queries, meta["BLOCK_M"]), heads, batch),
        args,
        {**constants, **two_blocks(k.shape[1])},
    )


@torch.library.custom_op("vlv::cross_attention", mutates_args=())
def cross_attention_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return [B, M, heads, d]."""
    out = _fake(q, k, v)
    _launch(q, k, v, out)
    return out


@cross_attention_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)
