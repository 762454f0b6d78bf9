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
def transpose(b_x):
    """Swap the last two axes of a matrix, or of each matrix of a batch."""
    return tl.permute(b_x, (0, 2, 1)) if len(b_x.shape) == 3 else tl.trans(b_x)


@triton.jit
def softmax_two_blocks(b_q, b_k0, b_k1, scale, m_k, SECOND: tl.constexpr, MASKED: tl.constexpr):
    """Return p0, p1 and row_sum: with s = scale q k^T, p = 2^(s - max_k s), row_sum = sum_k p.

    b_q: [Q, D]; b_k0: [K0, D]; b_k1: [K1, D]; or batches of them [G, ...]. If MASKED, only the keys m_k of the last
    block count. The scale includes log2(e) and is positive. A row whose length is no power of two takes two blocks
    (144 = 128 + 16) in place of a half empty one.
    """
    AXIS: tl.constexpr = len(b_q.shape) - 1
    b_s0 = dot(b_q, transpose(b_k0))
    if MASKED and not SECOND:
        b_s0 = tl.where(m_k[None, :], b_s0, float("-inf"))
    row_max = tl.max(b_s0, AXIS)
    b_p1 = b_s0
    if SECOND:
        b_s1 = dot(b_q, transpose(b_k1))
        if MASKED:
            b_s1 = tl.where(m_k[None, :], b_s1, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(b_s1, AXIS))
    # the scale is positive, so it is applied after the maximum: one multiply-add a score
    b_max = tl.expand_dims(row_max * scale, AXIS)
    b_p0 = tl.exp2(b_s0 * scale - b_max)
    row_sum = tl.sum(b_p0, AXIS)
    if SECOND:
        b_p1 = tl.exp2(b_s1 * scale - b_max)
        row_sum += tl.sum(b_p1, AXIS)
    return b_p0, b_p1, row_sum


@triton.jit
def values_two_blocks(b_p0, b_p1, row_sum, b_v0, b_v1, SECOND: tl.constexpr):
    """Return p v / row_sum: [Q, D] in the dtype of the sums, or a batch [G, Q, D]."""
    AXIS: tl.constexpr = len(b_p0.shape) - 1
    b_o = dot(b_p0.to(b_v0.dtype), b_v0)
    if SECOND:
        b_o += dot(b_p1.to(b_v1.dtype), b_v1)
    return b_o / tl.expand_dims(row_sum, AXIS)
