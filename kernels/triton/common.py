"""What several kernels share: products with wide sums, and a softmax over a row that lies in two tiles."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """a @ b summed in float32; float32 operands keep their precision (three TF32 products)."""
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
def two_tile_scores(q, k0, k1, scale, valid, SECOND: tl.constexpr, MASKED: tl.constexpr):
    """Softmax over the keys of one or two tiles: probabilities p0 and p1, not yet divided, and their sum.

    q: [Q, D]; k0: [K0, D]; k1: [K1, D]. Of the last tile only `valid` keys count, if MASKED. The scale includes
    log2(e). A row whose length is no power of two takes two tiles (144 = 128 + 16) in place of a half empty one.
    """
    s0 = dot(q, tl.trans(k0)) * scale
    if MASKED and not SECOND:
        s0 = tl.where(valid[None, :], s0, float("-inf"))
    top = tl.max(s0, 1)
    p1 = s0
    if SECOND:
        s1 = dot(q, tl.trans(k1)) * scale
        if MASKED:
            s1 = tl.where(valid[None, :], s1, float("-inf"))
        top = tl.maximum(top, tl.max(s1, 1))
        p1 = tl.exp2(s1 - top[:, None])
    p0 = tl.exp2(s0 - top[:, None])
    total = tl.sum(p0, 1)
    if SECOND:
        total += tl.sum(p1, 1)
    return p0, p1, total


@triton.jit
def two_tile_values(p0, p1, total, v0, v1, SECOND: tl.constexpr):
    """The probabilities times the values, divided by their sum: [Q, D] in the sums' precision."""
    out = dot(p0.to(v0.dtype), v0)
    if SECOND:
        out += dot(p1.to(v1.dtype), v1)
    return out / total[:, None]
