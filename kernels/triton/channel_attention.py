"""Channel attention in two passes over the tokens: sums of d x d products, then their softmax times the values."""

import triton
import triton.language as tl

from kernels.triton.common import dot


@triton.jit
def _tokens(start, tokens, end, stride_n, o_c, m_c, stride_c, BLOCK_N: tl.constexpr):
    """Return the offsets (int64) of a block of tokens' channels, and the mask of those that exist."""
    o_n = start + tl.arange(0, BLOCK_N)
    o_nc = o_n.to(tl.int64)[:, None] * stride_n + o_c.to(tl.int64)[None, :] * stride_c
    return o_nc, ((o_n < tokens) & (o_n < end))[:, None] & m_c[None, :]


@triton.jit
def gram(
    a,
    b,
    part,
    tokens,
    chunk,
    b_first,
    a_b,
    a_n,
    a_c,
    b_b,
    b_n,
    b_c,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """part [B, groups, splits, D, D] = sum over the tokens n of a chunk of a[n, i] b[n, j].

    a, b: [B, N, ...] strided; the first groups * D channels of a, and as many of b from b_first on. Grid: splits,
    groups, batch.
    """
    i_b, i_g = tl.program_id(2).to(tl.int64), tl.program_id(1)
    first = tl.program_id(0) * chunk
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_g * D + o_d
    b_sum = tl.zeros((BLOCK_D, BLOCK_D), tl.float64 if DOUBLE else tl.float32)
    for start in range(first, first + chunk, BLOCK_N):
        o_nc, m_nc = _tokens(start, tokens, first + chunk, a_n, o_c, m_d, a_c, BLOCK_N)
        b_a = tl.load(a + i_b * a_b + o_nc, mask=m_nc, other=0.0)
        o_nc, m_nc = _tokens(start, tokens, first + chunk, b_n, o_c + b_first, m_d, b_c, BLOCK_N)
        b_x = tl.load(b + i_b * b_b + o_nc, mask=m_nc, other=0.0)
        b_sum += dot(tl.trans(b_a), b_x)
    o_part = ((i_b * tl.num_programs(1) + i_g) * tl.num_programs(0) + tl.program_id(0)) * D * D
    tl.store(part + o_part + o_d[:, None] * D + o_d[None, :], b_sum, mask=m_d[:, None] & m_d[None, :])


@triton.jit
def _sum_parts(part, splits, o_d, m_d, D: tl.constexpr, BLOCK_D: tl.constexpr, DOUBLE: tl.constexpr):
    """Return the sum of a group's partial products, in a fixed order."""
    group = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    p_part = part + group * splits * D * D + o_d[:, None] * D + o_d[None, :]
    b_sum = tl.zeros((BLOCK_D, BLOCK_D), tl.float64 if DOUBLE else tl.float32)
    for split in range(splits):
        b_sum += tl.load(p_part + split * D * D, mask=m_d[:, None] & m_d[None, :], other=0.0)
    return b_sum


@triton.jit
def _softmax(b_s, m_d):
    b_s = tl.where(m_d[None, :], b_s, float("-inf"))
    b_p = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * 1.4426950408889634)
    return b_p / tl.sum(b_p, 1)[:, None]


@triton.jit
def apply(
    qkv,
    part,
    out,
    tokens,
    chunk,
    splits,
    C,
    stride_b,
    stride_n,
    stride_c,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """out [B, N, C] contiguous = v p^T with p = softmax(scale q^T k), from the partial sums of q^T k.

    Grid: chunks, groups, batch.
    """
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = tl.program_id(1) * D + o_d
    b_p = _softmax(_sum_parts(part, splits, o_d, m_d, D, BLOCK_D, DOUBLE) * scale, m_d)
    b_p = tl.where(m_d[:, None], b_p, 0.0).to(out.dtype.element_ty)
    first = tl.program_id(0) * chunk
    for start in range(first, first + chunk, BLOCK_N):
        o_nc, m_nc = _tokens(start, tokens, first + chunk, stride_n, o_c + 2 * C, m_d, stride_c, BLOCK_N)
        b_v = tl.load(qkv + i_b * stride_b + o_nc, mask=m_nc, other=0.0)
        o_nc, m_nc = _tokens(start, tokens, first + chunk, C, o_c, m_d, 1, BLOCK_N)
        b_o = dot(b_v, tl.trans(b_p))
        tl.store(out + i_b * tokens * C + o_nc, b_o.to(out.dtype.element_ty), mask=m_nc)


@triton.jit
def backward(
    qkv,
    grad,
    part,
    grad_part,
    grad_qkv,
    tokens,
    chunk,
    splits,
    C,
    stride_b,
    stride_n,
    stride_c,
    grad_b,
    grad_n,
    grad_c,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """grad_qkv [B, N, 3C] contiguous, from the partial sums of q^T k and of dp = grad^T v.

    ds = scale p (dp - sum_j p dp); dq = k ds^T, dk = q ds, dv = grad p. Grid: chunks, groups, batch.
    """
    i_b = tl.program_id(2).to(tl.int64)
    element = grad_qkv.dtype.element_ty
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = tl.program_id(1) * D + o_d
    b_p = _softmax(_sum_parts(part, splits, o_d, m_d, D, BLOCK_D, DOUBLE) * scale, m_d)
    b_p = tl.where(m_d[:, None], b_p, 0.0)
    b_dp = _sum_parts(grad_part, splits, o_d, m_d, D, BLOCK_D, DOUBLE)
    b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * scale).to(element)
    b_p = b_p.to(element)
    base = qkv + i_b * stride_b
    first = tl.program_id(0) * chunk
    for start in range(first, first + chunk, BLOCK_N):
        o_nc, m_nc = _tokens(start, tokens, first + chunk, stride_n, o_c, m_d, stride_c, BLOCK_N)
        b_q = tl.load(base + o_nc, mask=m_nc, other=0.0)
        o_nc, m_nc = _tokens(start, tokens, first + chunk, stride_n, o_c + C, m_d, stride_c, BLOCK_N)
        b_k = tl.load(base + o_nc, mask=m_nc, other=0.0)
        o_nc, m_nc = _tokens(start, tokens, first + chunk, grad_n, o_c, m_d, grad_c, BLOCK_N)
        b_do = tl.load(grad + i_b * grad_b + o_nc, mask=m_nc, other=0.0)
        o_nc, m_nc = _tokens(start, tokens, first + chunk, 3 * C, o_c, m_d, 1, BLOCK_N)
        p_out = grad_qkv + i_b * tokens * 3 * C + o_nc
        tl.store(p_out, dot(b_k, tl.trans(b_ds)).to(element), mask=m_nc)
        tl.store(p_out + C, dot(b_q, b_ds).to(element), mask=m_nc)
        tl.store(p_out + 2 * C, dot(b_do, b_p).to(element), mask=m_nc)
