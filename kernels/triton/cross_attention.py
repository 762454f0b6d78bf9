"""Attention of many queries to few keys, all of which stay on the chip."""

import triton
import triton.language as tl

from kernels.triton.common import softmax_two_blocks, values_two_blocks


@triton.jit
def _load(base, o_n, count, stride_n, o_d, m_d, stride_d):
    p_x = base + o_n.to(tl.int64)[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
    return tl.load(p_x, mask=(o_n < count)[:, None] & m_d[None, :], other=0.0)


@triton.jit
def forward(
    q,
    k,
    v,
    out,
    queries,
    row,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    scale,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out = softmax(scale q k^T) v for a block of queries of one head.

    q [B, M, heads, d], k and v [B, KEYS, heads, d], strided -> out [B, M, row = heads * d] contiguous. The keys lie in
    a block of BLOCK_K0 and, if SECOND, one of BLOCK_K1: 77 in 64 + 16. Grid: blocks of queries, heads, batch.
    """
    MASKED: tl.constexpr = (BLOCK_K0 + BLOCK_K1 if SECOND else BLOCK_K0) > KEYS
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_k0 = tl.arange(0, BLOCK_K0)
    o_k1 = BLOCK_K0 + tl.arange(0, BLOCK_K1)
    m_k = (o_k1 if SECOND else o_k0) < KEYS
    k_head, v_head = k + i_b * k_b + i_h * k_h, v + i_b * v_b + i_h * v_h
    b_k0 = _load(k_head, o_k0, KEYS, k_n, o_d, m_d, k_d)
    b_v0 = _load(v_head, o_k0, KEYS, v_n, o_d, m_d, v_d)
    b_k1, b_v1 = b_k0, b_v0
    if SECOND:
        b_k1 = _load(k_head, o_k1, KEYS, k_n, o_d, m_d, k_d)
        b_v1 = _load(v_head, o_k1, KEYS, v_n, o_d, m_d, v_d)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = _load(q + i_b * q_b + i_h * q_h, o_m, queries, q_n, o_d, m_d, q_d)
    b_p0, b_p1, row_sum = softmax_two_blocks(b_q, b_k0, b_k1, scale, m_k, SECOND, MASKED)
    b_o = values_two_blocks(b_p0, b_p1, row_sum, b_v0, b_v1, SECOND).to(out.dtype.element_ty)
    p_o = out + (i_b * queries + o_m)[:, None] * row + i_h * HEAD_DIM + o_d[None, :]
    tl.store(p_o, b_o, mask=(o_m < queries)[:, None] & m_d[None, :])
