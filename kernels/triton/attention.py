"""Attention with a running softmax (Dao 2023, arXiv 2307.08691): scores stay on the chip, forward and backward.

All tensors are [B, heads, tokens, head_dim] with any strides; log-sums [B, heads, tokens] are base 2 and contiguous.
Grid of each kernel: blocks of tokens, heads, batch.
"""

import triton
import triton.language as tl

from kernels.triton.common import dot


@triton.jit
def _head(x, stride_b, stride_h, stride_n, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return, of this program's head of x: pointers to its first token's channels, their mask, the tokens' stride."""
    o_d = tl.arange(0, BLOCK_D)
    p_head = x + tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h
    return p_head + o_d.to(tl.int64) * stride_d, o_d < HEAD_DIM, tl.cast(stride_n, tl.int64)


@triton.jit
def _load_rows(head, o_n, count):
    """Load the tokens o_n of a head: [tokens, head_dim], zero beyond `count`."""
    p_d, m_d, stride = head
    p_x = p_d[None, :] + o_n.to(tl.int64)[:, None] * stride
    return tl.load(p_x, mask=(o_n < count)[:, None] & m_d[None, :], other=0.0)


@triton.jit
def _store_rows(head, b_x, o_n, count):
    p_d, m_d, stride = head
    p_x = p_d[None, :] + o_n.to(tl.int64)[:, None] * stride
    tl.store(p_x, b_x.to(p_d.dtype.element_ty), mask=(o_n < count)[:, None] & m_d[None, :])


@triton.jit
def _source(
    x,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return what blocks of a head's `count` tokens are loaded from: a tensor descriptor, or pointers as in _head."""
    if TMA:
        p_head = x + tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h
        source = tl.make_tensor_descriptor(
            p_head, shape=[count, HEAD_DIM], strides=[tl.cast(stride_n, tl.int64), 1], block_shape=[BLOCK_N, BLOCK_D]
        )
    else:
        source = _head(x, stride_b, stride_h, stride_n, stride_d, HEAD_DIM, BLOCK_D)
    return source


@triton.jit
def _load_block(source, start, count, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """Load the tokens from `start` on: [BLOCK_N, head_dim], zero beyond `count`."""
    if TMA:
        b_x = source.load([start, 0])
    else:
        b_x = _load_rows(source, start + tl.arange(0, BLOCK_N), count)
    return b_x


@triton.jit
def _keys_step(
    b_q,
    k_source,
    v_source,
    o_m,
    start,
    keys,
    scale,
    b_o,
    row_max,
    row_sum,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add a block of keys to the running softmax: alpha = 2^(old row_max - new row_max); o = alpha o + p v."""
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = _load_block(k_source, start, keys, BLOCK_N, TMA)
    b_s = dot(b_q, tl.trans(b_k)) * scale
    if MASKED:
        m_s = (o_n < keys)[None, :]
        if CAUSAL:
            m_s = m_s & (o_m[:, None] >= o_n[None, :])
        b_s = tl.where(m_s, b_s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    b_v = _load_block(v_source, start, keys, BLOCK_N, TMA)
    b_o = b_o * alpha[:, None] + dot(b_p.to(b_v.dtype), b_v)
    return b_o, new_max, row_sum * alpha + tl.sum(b_p, 1)


@triton.jit
def forward(
    q,
    k,
    v,
    out,
    logsum,
    queries,
    keys,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    out_b,
    out_h,
    out_n,
    out_d,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOUBLE: tl.constexpr,
    DESCRIBABLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """out = softmax(s) v and logsum = log2(sum 2^s) of a block of queries, with s = scale q k^T.

    The scale includes log2(e). Causal: query i sees keys 0 to i.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    DESCRIBED: tl.constexpr = TMA and DESCRIBABLE
    first = tl.program_id(0) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    b_q = _load_rows(_head(q, q_b, q_h, q_n, q_d, HEAD_DIM, BLOCK_D), o_m, queries)
    k_source = _source(k, k_b, k_h, k_n, k_d, keys, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIBED)
    v_source = _source(v, v_b, v_h, v_n, v_d, keys, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIBED)
    b_o = tl.zeros((BLOCK_M, BLOCK_D), SUM)
    row_max = tl.full((BLOCK_M,), float("-inf"), SUM)
    row_sum = tl.zeros((BLOCK_M,), SUM)
    end = keys
    unmasked = keys // BLOCK_N * BLOCK_N  # keys before this one need no mask
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
        unmasked = tl.minimum(keys, first) // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):
        for start in range(unmasked * masked, end if masked else unmasked, BLOCK_N):
            b_o, row_max, row_sum = _keys_step(
                b_q,
                k_source,
                v_source,
                o_m,
                start,
                keys,
                scale,
                b_o,
                row_max,
                row_sum,
                BLOCK_N,
                CAUSAL,
                masked,
                DESCRIBED,
            )
    b_o = b_o / row_sum[:, None]
    _store_rows(_head(out, out_b, out_h, out_n, out_d, HEAD_DIM, BLOCK_D), b_o, o_m, queries)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(logsum + head * queries + o_m, row_max + tl.log2(row_sum), mask=o_m < queries)


@triton.jit
def delta(
    out,
    grad,
    sums,
    queries,
    out_b,
    out_h,
    out_n,
    out_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sums [B, heads, tokens] = sum_d out grad, the mean of the probabilities' gradient in each row."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_o = _load_rows(_head(out, out_b, out_h, out_n, out_d, HEAD_DIM, BLOCK_D), o_m, queries).to(SUM)
    b_do = _load_rows(_head(grad, grad_b, grad_h, grad_n, grad_d, HEAD_DIM, BLOCK_D), o_m, queries).to(SUM)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + head * queries + o_m, tl.sum(b_o * b_do, 1), mask=o_m < queries)


@triton.jit
def _probabilities(q, k, b_do, v, logsum, sums, o_m, o_n, queries, keys, scale, CAUSAL: tl.constexpr):
    """Return p = 2^(s - logsum) and ds = scale p (grad v^T - sums) of queries o_m and keys o_n; 0 where masked."""
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    b_logsum = tl.load(logsum + head * queries + o_m, mask=o_m < queries, other=0.0)
    mean = tl.load(sums + head * queries + o_m, mask=o_m < queries, other=0.0)
    m_s = (o_m < queries)[:, None] & (o_n < keys)[None, :]
    if CAUSAL:
        m_s = m_s & (o_m[:, None] >= o_n[None, :])
    b_s = tl.where(m_s, dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))
    b_p = tl.exp2(b_s - b_logsum[:, None])
    b_ds = b_p * (dot(b_do, tl.trans(v)) - mean[:, None]) * scale
    return b_p.to(b_do.dtype), b_ds.to(q.dtype)


@triton.jit
def backward(
    q,
    k,
    v,
    grad,
    logsum,
    sums,
    grad_0,
    grad_1,
    queries,
    keys,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOUBLE: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Gradients of a block of BLOCK_OUT tokens, from all blocks of BLOCK_IN tokens of the other kind.

    OF_KEYS: grad_0 = grad_k = sum_m ds^T q and grad_1 = grad_v = sum_m p^T grad of a block of keys; else
    grad_0 = grad_q = sum_n ds k of a block of queries. All are [B, tokens, heads, head_dim] contiguous.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    first = tl.program_id(0) * BLOCK_OUT
    o_out = first + tl.arange(0, BLOCK_OUT)
    q_head = _head(q, q_b, q_h, q_n, q_d, HEAD_DIM, BLOCK_D)
    k_head = _head(k, k_b, k_h, k_n, k_d, HEAD_DIM, BLOCK_D)
    v_head = _head(v, v_b, v_h, v_n, v_d, HEAD_DIM, BLOCK_D)
    grad_head = _head(grad, grad_b, grad_h, grad_n, grad_d, HEAD_DIM, BLOCK_D)
    begin = 0
    if OF_KEYS:
        outs, end = keys, queries
        b_k, b_v = _load_rows(k_head, o_out, keys), _load_rows(v_head, o_out, keys)
        if CAUSAL:
            begin = first // BLOCK_IN * BLOCK_IN
    else:
        outs, end = queries, keys
        b_q, b_do = _load_rows(q_head, o_out, queries), _load_rows(grad_head, o_out, queries)
        if CAUSAL:
            end = tl.minimum(keys, first + BLOCK_OUT)
    b_0 = tl.zeros((BLOCK_OUT, BLOCK_D), SUM)
    b_1 = tl.zeros((BLOCK_OUT, BLOCK_D), SUM)
    for start in range(begin, end, BLOCK_IN):
        o_in = start + tl.arange(0, BLOCK_IN)
        if OF_KEYS:
            b_q, b_do = _load_rows(q_head, o_in, queries), _load_rows(grad_head, o_in, queries)
            b_p, b_ds = _probabilities(b_q, b_k, b_do, b_v, logsum, sums, o_in, o_out, queries, keys, scale, CAUSAL)
            b_1 += dot(tl.trans(b_p), b_do)
            b_0 += dot(tl.trans(b_ds), b_q)
        else:
            b_k, b_v = _load_rows(k_head, o_in, keys), _load_rows(v_head, o_in, keys)
            _, b_ds = _probabilities(b_q, b_k, b_do, b_v, logsum, sums, o_out, o_in, queries, keys, scale, CAUSAL)
            b_0 += dot(b_ds, b_k)
    row = tl.cast(outs, tl.int64) * HEADS * HEAD_DIM
    _store_rows(_head(grad_0, row, HEAD_DIM, HEADS * HEAD_DIM, 1, HEAD_DIM, BLOCK_D), b_0, o_out, outs)
    if OF_KEYS:
        _store_rows(_head(grad_1, row, HEAD_DIM, HEADS * HEAD_DIM, 1, HEAD_DIM, BLOCK_D), b_1, o_out, outs)
