"""Softmax attention over all tokens, causal or not, with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.spec import ALIGNMENT
from kernels.runtime.tiles import LOG2_E, cdiv, power_of_two, strides, sum_dtype
from kernels.runtime.tuning import reference_is_faster


def attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v: q [B, heads, M, d]; k, v [B, heads, N, d] -> [B, heads, M, d].

    Causal: query i sees keys 0 to i, also where M and N differ (PyTorch's is_causal).
    """
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Compute `attention_reference` by our kernel on CUDA, unless PyTorch measured faster there (kernels/tuned.json).

    The result's memory is [B, M, heads, d], so merging the heads afterwards copies nothing.
    """
    m, n, d = q.shape[2], k.shape[2], q.shape[3]
    shape = f"m{m}n{n}d{d}{' causal' if causal else ''}"
    # the kernel does not broadcast batches or heads, as the reference does
    fits = 16 <= d <= 256 and n > 0 and k.shape == v.shape == (*q.shape[:2], n, d)
    if fused("attention", q, k, v, fits=fits) and not reference_is_faster("attention", shape, q):
        return attention_op(q, k, v, causal)[0]
    return attention_reference(q, k, v, causal)


def _describable(*tensors: Tensor) -> bool:
    """Return True if tensor descriptors can stand for these: all strides 16-byte aligned, channels contiguous."""
    return all(
        x.stride(-1) == 1
        and x.dtype != torch.float64
        and all(n * x.element_size() % ALIGNMENT == 0 for n in (*x.stride()[:-1], x.storage_offset()))
        for x in tensors
    )


def _launch(
    kernel: str, tokens: int, block: str, args: dict, q: Tensor, part: str = "", **constants: int | bool
) -> None:
    """Launch a kernel over blocks of `tokens` tokens; `block` is the constant that holds their size.

    part: distinguishes classes of shapes that are tuned apart.
    """
    batch, heads, _, head_dim = q.shape
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim)}
    launch(
        f"attention.{kernel}",
        f"{part}d{head_dim}",
        lambda meta: (cdiv(tokens, meta[block]), heads, batch),
        args,
        {**shape, **constants, "DOUBLE": q.dtype == torch.float64},
    )


@torch.library.custom_op("vlv::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the result [B, heads, M, d] and the base-2 log-sums of its scores [B, heads, M]."""
    out, logsum = _fake(q, k, v, causal)
    args = {"q": q, "k": k, "v": v, "out": out, "logsum": logsum, "queries": q.shape[2], "keys": k.shape[2]}
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        args |= strides(name, x, "bhnd")
    args["scale"] = q.shape[-1] ** -0.5 * LOG2_E
    _launch("forward", q.shape[2], "BLOCK_M", args, q, CAUSAL=causal, DESCRIBABLE=_describable(k, v))
    return out, logsum


@attention_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    b, heads, m, d = q.shape
    return q.new_empty(b, m, heads, d).transpose(1, 2), q.new_empty(b, heads, m, dtype=sum_dtype(q))


@torch.library.custom_op("vlv::attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    queries, keys = q.shape[2], k.shape[2]
    grad_q, grad_k, grad_v = _fake_backward(grad, q, k, v, out, logsum, causal)
    sums = torch.empty_like(logsum)
    grad_strides = strides("grad", grad, "bhnd")
    args = {"out": out, "grad": grad, "sums": sums, "queries": queries, **strides("out", out, "bhnd"), **grad_strides}
    _launch("delta", queries, "BLOCK_M", args, q)
    shared = {"q": q, "k": k, "v": v, "grad": grad, "logsum": logsum, "sums": sums, "queries": queries, "keys": keys}
    for name, x in (("q", q), ("k", k), ("v", v)):
        shared |= strides(name, x, "bhnd")
    shared |= {**grad_strides, "scale": q.shape[-1] ** -0.5}
    # the outputs are [B, tokens, heads, d] in memory
    constants = {"CAUSAL": causal, "HEADS": q.shape[1]}
    of_keys, of_queries = {"grad_0": grad_k, "grad_1": grad_v}, {"grad_0": grad_q, "grad_1": grad_q}
    _launch("backward", keys, "BLOCK_OUT", {**shared, **of_keys}, q, "keys ", **constants, OF_KEYS=True)
    _launch("backward", queries, "BLOCK_OUT", {**shared, **of_queries}, q, "queries ", **constants, OF_KEYS=False)
    return grad_q, grad_k, grad_v


@attention_backward_op.register_fake
def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q_like, k_like, v_like = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
    return q_like.transpose(1, 2), k_like.transpose(1, 2), v_like.transpose(1, 2)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _):
    return *attention_backward_op(grad, *ctx.saved_tensors, ctx.causal), None


attention_op.register_autograd(_backward, setup_context=_setup_context)
