"""Device functions that several kernels share: products with float32 sums, and a softmax over two blocks of keys."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """Return a @ b summed in float32; float32 operands keep their precision (three TF32 products)."""
    if INTERPRET and a.dtype != tl.float64:  # its bfloat16 is a bit pattern, which NumPy cannot multiply
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float64:
        result = tl.dot(a, b, out_dtype=tl.float64)
    elif a.dtype == tl.float32:
        result = tl.dot(a, b, input_precision="tf32x3")
    else:
        result = tl.dot(a, b)
    return result


@triton.jit
def softmax_two_blocks(b_q, b_k0, b_k1, scale, m_k, SECOND: tl.constexpr, MASKED: tl.constexpr):
    """Return p0, p1 and row_sum: with s = scale q k^T and row_max = max_k s, p = 2^(s - row_max), row_sum = sum_k p.

    b_q: [Q, D]; b_k0: [K0, D]; b_k1: [K1, D]. If MASKED, only the keys m_k of the last block count. The scale includes
    log2(e). A row whose length is no power of two takes two blocks (144 = 128 + 16) in place of a half empty one.
    """
    b_s0 = dot(b_q, tl.trans(b_k0)) * scale
    if MASKED and not SECOND:
        b_s0 = tl.where(m_k[None, :], b_s0, float("-inf"))
    row_max = tl.max(b_s0, 1)
    b_p1 = b_s0
    if SECOND:
        b_s1 = dot(b_q, tl.trans(b_k1)) * scale
        if MASKED:
            b_s1 = tl.where(m_k[None, :], b_s1, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(b_s1, 1))
        b_p1 = tl.exp2(b_s1 - row_max[:, None])
    b_p0 = tl.exp2(b_s0 - row_max[:, None])
    row_sum = tl.sum(b_p0, 1)
    if SECOND:
        row_sum += tl.sum(b_p1, 1)
    return b_p0, b_p1, row_sum


@triton.jit
def values_two_blocks(b_p0, b_p1, row_sum, b_v0, b_v1, SECOND: tl.constexpr):
    """Return p v / row_sum: [Q, D] in the dtype of the sums."""
    b_o = dot(b_p0.to(b_v0.dtype), b_v0)
    if SECOND:
        b_o += dot(b_p1.to(b_v1.dtype), b_v1)
    return b_o / row_sum[:, None]
