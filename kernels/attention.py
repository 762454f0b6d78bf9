"""Softmax attention over all tokens, causal or not, with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import ALIGNMENT, launch
from kernels.runtime.tiles import LOG2_E, power_of_two, strides, sum_dtype
from kernels.runtime.tuning import reference_is_faster


def attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q [B, heads, M, d]; k, v [B, heads, N, d] -> [B, heads, M, d].

    Causal: query i sees keys 0 to i, also where M and N differ (PyTorch's is_causal).
    """
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """`attention_reference`, by our kernel on CUDA unless PyTorch's own measured faster there (kernels/tuned.json).

    The result's memory is [B, M, heads, d], so that merging the heads afterwards costs nothing.
    """
    if (
        fused(q, k, v)
        and 16 <= q.shape[-1] <= 256
        and k.shape[2] > 0
        and not (q.device.type == "cuda" and reference_is_faster("attention", q.device.index))
    ):
        return attention_op(q, k, v, causal)[0]
    return attention_reference(q, k, v, causal)


def _describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can stand for these: 16-byte alignment throughout, channels side by side."""
    return all(
        x.stride(-1) == 1
        and x.dtype != torch.float64
        and all(n * x.element_size() % ALIGNMENT == 0 for n in (*x.stride()[:-1], x.storage_offset()))
        for x in tensors
    )


def _launch(kernel: str, block: str, args: dict, q: Tensor, causal: bool | None, **constants: int) -> None:
    """Start a kernel over blocks of `block`'s tokens ("queries, BLOCK_M")."""
    batch, heads, _, head_dim = q.shape
    flags = {} if causal is None else {"CAUSAL": causal}
    launch(
        f"attention.{kernel}", f"d{head_dim}", (f"cdiv({block})", "heads", "batch"), args,
        {"HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim), **constants, **flags,
         "DOUBLE": q.dtype == torch.float64},
        heads=heads, batch=batch,
    )  # fmt: skip


@torch.library.custom_op("vlv::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The result, and the base-2 log-sums of its scores [B, heads, M]."""
    out, logsum = _empty_result(q, k, v, causal)
    args = {
        "q": q, "k": k, "v": v, "out": out, "logsum": logsum, "queries": q.shape[2], "keys": k.shape[2],
        **strides("q", q, "bhnd"), **strides("k", k, "bhnd"), **strides("v", v, "bhnd"), **strides("out", out, "bhnd"),
        "scale": q.shape[-1] ** -0.5 * LOG2_E,
    }  # fmt: skip
    _launch("forward", "queries, BLOCK_M", args, q, causal, DESCRIBABLE=_describable(k, v))
    return out, logsum


@attention_op.register_fake
def _empty_result(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    b, heads, m, d = q.shape
    return q.new_empty(b, m, heads, d).transpose(1, 2), q.new_empty(b, heads, m, dtype=sum_dtype(q))


@torch.library.custom_op("vlv::attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = _empty_gradients(grad, q, k, v, out, logsum, causal)
    sums = torch.empty_like(logsum)
    grad_strides = strides("grad", grad, "bhnd")
    args = {"out": out, "grad": grad, "sums": sums, "queries": q.shape[2], **strides("out", out, "bhnd")}
    _launch("delta", "queries, BLOCK_M", {**args, **grad_strides}, q, None)
    shared = {
        "q": q, "k": k, "v": v, "grad": grad, "logsum": logsum, "sums": sums, "queries": q.shape[2],
        "keys": k.shape[2], **strides("q", q, "bhnd"), **strides("k", k, "bhnd"), **strides("v", v, "bhnd"),
        **grad_strides, "scale": q.shape[-1] ** -0.5,
    }  # fmt: skip
    # the outputs are [B, tokens, heads, d] in memory
    outputs = {"grad_k": grad_k, "grad_v": grad_v}
    _launch("key_backward", "keys, BLOCK_N", {**shared, **outputs}, q, causal, HEADS=q.shape[1])
    _launch("query_backward", "queries, BLOCK_M", {**shared, "grad_q": grad_q}, q, causal, HEADS=q.shape[1])
    return grad_q, grad_k, grad_v


@attention_backward_op.register_fake
def _empty_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q_like, k_like, v_like = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
    return q_like.transpose(1, 2), k_like.transpose(1, 2), v_like.transpose(1, 2)


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _):
    return *attention_backward_op(grad, *ctx.saved_tensors, ctx.causal), None


attention_op.register_autograd(_backward, setup_context=_setup)
