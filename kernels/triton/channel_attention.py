"""Channel attention in two passes over the tokens: sums of d x d products, then their softmax times the values."""

import triton
import triton.language as tl

from kernels.triton.common import dot


@triton.jit
def _places(start, tokens, limit, stride_n, c, used, stride_c, BLOCK_N: tl.constexpr):
    """Offsets (int64) of a block of tokens' channels, and which of them exist."""
    n = start + tl.arange(0, BLOCK_N)
    offsets = n.to(tl.int64)[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_c
    return offsets, ((n < tokens) & (n < limit))[:, None] & used[None, :]


@triton.jit
def gram(
    a, b, part, tokens, chunk, b_first, a_b, a_n, a_c, b_b, b_n, b_c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """part [B, groups, splits, D, D] = a^T b of each chunk of tokens. Grid: splits, groups, batch.

    a, b: [B, N, …] strided, of which the first groups * D channels of a count, and those of b from b_first on.
    """
    batch, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    first = tl.program_id(0) * chunk
    lanes = tl.arange(0, BLOCK_D)
    used = lanes < D
    c = group * D + lanes
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float64 if DOUBLE else tl.float32)
    for start in range(first, first + chunk, BLOCK_N):
        at, mask = _places(start, tokens, first + chunk, a_n, c, used, a_c, BLOCK_N)
        x = tl.load(a + batch * a_b + at, mask=mask, other=0.0)
        at, mask = _places(start, tokens, first + chunk, b_n, c + b_first, used, b_c, BLOCK_N)
        y = tl.load(b + batch * b_b + at, mask=mask, other=0.0)
        total += dot(tl.trans(x), y)
    row = ((batch * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)) * D * D
    tl.store(part + row + lanes[:, None] * D + lanes[None, :], total, mask=used[:, None] & used[None, :])


@triton.jit
def _summed(part, splits, lanes, used, D: tl.constexpr, BLOCK_D: tl.constexpr, DOUBLE: tl.constexpr):
    """The sum of a group's partial products, in a fixed order."""
    group = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    places = part + group * splits * D * D + lanes[:, None] * D + lanes[None, :]
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float64 if DOUBLE else tl.float32)
    for split in range(splits):
        total += tl.load(places + split * D * D, mask=used[:, None] & used[None, :], other=0.0)
    return total


@triton.jit
def _softmax(scores, used):
    scores = tl.where(used[None, :], scores, float("-inf"))
    p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * 1.4426950408889634)
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def apply(
    qkv, part, out, tokens, chunk, splits, C, stride_b, stride_n, stride_c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """out [B, N, C] contiguous = v times the transposed softmax of the summed scores. Grid: chunks, groups, batch."""
    batch = tl.program_id(2).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    used = lanes < D
    c = tl.program_id(1) * D + lanes
    p = _softmax(_summed(part, splits, lanes, used, D, BLOCK_D, DOUBLE) * scale, used)
    p = tl.where(used[:, None], p, 0.0).to(out.dtype.element_ty)
    first = tl.program_id(0) * chunk
    for start in range(first, first + chunk, BLOCK_N):
        at, mask = _places(start, tokens, first + chunk, stride_n, c + 2 * C, used, stride_c, BLOCK_N)
        v = tl.load(qkv + batch * stride_b + at, mask=mask, other=0.0)
        at, mask = _places(start, tokens, first + chunk, C, c, used, 1, BLOCK_N)
        o = dot(v, tl.trans(p))
        tl.store(out + batch * tokens * C + at, o.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    qkv, grad, part, grad_part, grad_qkv, tokens, chunk, splits, C, stride_b, stride_n, stride_c,
    grad_b, grad_n, grad_c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """grad_qkv [B, N, 3C] contiguous, from the partial sums of q^T k and of grad^T v. Grid: chunks, groups, batch."""
    batch = tl.program_id(2).to(tl.int64)
    element = grad_qkv.dtype.element_ty
    lanes = tl.arange(0, BLOCK_D)
    used = lanes < D
    c = tl.program_id(1) * D + lanes
    p = _softmax(_summed(part, splits, lanes, used, D, BLOCK_D, DOUBLE) * scale, used)
    p = tl.where(used[:, None], p, 0.0)
    dp = _summed(grad_part, splits, lanes, used, D, BLOCK_D, DOUBLE)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(element)
    p = p.to(element)
    base = qkv + batch * stride_b
    first = tl.program_id(0) * chunk
    for start in range(first, first + chunk, BLOCK_N):
        at, mask = _places(start, tokens, first + chunk, stride_n, c, used, stride_c, BLOCK_N)
        q = tl.load(base + at, mask=mask, other=0.0)
        at, mask = _places(start, tokens, first + chunk, stride_n, c + C, used, stride_c, BLOCK_N)
        k = tl.load(base + at, mask=mask, other=0.0)
        at, mask = _places(start, tokens, first + chunk, grad_n, c, used, grad_c, BLOCK_N)
        do = tl.load(grad + batch * grad_b + at, mask=mask, other=0.0)
        at, mask = _places(start, tokens, first + chunk, 3 * C, c, used, 1, BLOCK_N)
        target = grad_qkv + batch * tokens * 3 * C + at
        tl.store(target, dot(k, tl.trans(ds)).to(element), mask=mask)
        tl.store(target + C, dot(q, ds).to(element), mask=mask)
        tl.store(target + 2 * C, dot(do, p).to(element), mask=mask)
