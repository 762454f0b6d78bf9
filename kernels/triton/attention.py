"""Attention with a running softmax (Dao 2023, arXiv 2307.08691): scores never leave the chip, forward or backward.

All tensors are [B, heads, tokens, head_dim] with any strides; log-sums [B, heads, tokens] are base 2 and contiguous.
Grid of each kernel: blocks of tokens, heads, batch.
"""

import triton
import triton.language as tl

from kernels.triton.common import dot


@triton.jit
def _head(x, stride_b, stride_h, stride_n, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's head of x: pointers to its first token's channels, which of them exist, the tokens' stride."""
    lanes = tl.arange(0, BLOCK_D)
    first = x + tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h
    return first + lanes.to(tl.int64) * stride_d, lanes < HEAD_DIM, tl.cast(stride_n, tl.int64)


@triton.jit
def _rows(head, rows, count):
    """Tokens `rows` of a head: [rows, head_dim], zero where there are none."""
    pointers, used, stride = head
    places = pointers[None, :] + rows.to(tl.int64)[:, None] * stride
    return tl.load(places, mask=(rows < count)[:, None] & used[None, :], other=0.0)


@triton.jit
def _store_rows(head, x, rows, count):
    pointers, used, stride = head
    places = pointers[None, :] + rows.to(tl.int64)[:, None] * stride
    tl.store(places, x.to(pointers.dtype.element_ty), mask=(rows < count)[:, None] & used[None, :])


@triton.jit
def _source(
    x, stride_b, stride_h, stride_n, stride_d, count,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What blocks of a head's `count` tokens are loaded from: a tensor descriptor, or pointers as in _head."""
    if TMA:
        first = x + tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h
        source = tl.make_tensor_descriptor(
            first, shape=[count, HEAD_DIM], strides=[tl.cast(stride_n, tl.int64), 1], block_shape=[BLOCK_N, BLOCK_D]
        )
    else:
        source = _head(x, stride_b, stride_h, stride_n, stride_d, HEAD_DIM, BLOCK_D)
    return source


@triton.jit
def _block(source, start, count, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """The tokens from `start` on: [BLOCK_N, head_dim], zero where there are none."""
    if TMA:
        x = source.load([start, 0])
    else:
        x = _rows(source, start + tl.arange(0, BLOCK_N), count)
    return x


@triton.jit
def _keys_step(
    q, k_source, v_source, rows, start, keys, scale, out, top, total,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The running softmax after another block of keys."""
    columns = start + tl.arange(0, BLOCK_N)
    k = _block(k_source, start, keys, BLOCK_N, TMA)
    scores = dot(q, tl.trans(k)) * scale
    if MASKED:
        seen = (columns < keys)[None, :]
        if CAUSAL:
            seen = seen & (rows[:, None] >= columns[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    v = _block(v_source, start, keys, BLOCK_N, TMA)
    out = out * shrink[:, None] + dot(p.to(v.dtype), v)
    return out, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def forward(
    q, k, v, out, logsum, queries, keys,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, out_b, out_h, out_n, out_d, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, DOUBLE: tl.constexpr,
    DESCRIBABLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out and logsum of a block of queries. The scale includes log2(e). Causal: query i sees keys 0 to i."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    queried = _rows(_head(q, q_b, q_h, q_n, q_d, HEAD_DIM, BLOCK_D), rows, queries)
    DESCRIBED: tl.constexpr = TMA and DESCRIBABLE
    k_source = _source(k, k_b, k_h, k_n, k_d, keys, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIBED)
    v_source = _source(v, v_b, v_h, v_n, v_d, keys, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIBED)
    result = tl.zeros((BLOCK_M, BLOCK_D), SUM)
    top = tl.full((BLOCK_M,), float("-inf"), SUM)
    total = tl.zeros((BLOCK_M,), SUM)
    end = keys
    whole = keys // BLOCK_N * BLOCK_N  # keys up to here need no mask
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
        whole = tl.minimum(keys, first) // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        result, top, total = _keys_step(
            queried, k_source, v_source, rows, start, keys, scale, result, top, total,
            BLOCK_N, CAUSAL, False, DESCRIBED,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        result, top, total = _keys_step(
            queried, k_source, v_source, rows, start, keys, scale, result, top, total,
            BLOCK_N, CAUSAL, True, DESCRIBED,
        )  # fmt: skip
    result = result / total[:, None]
    _store_rows(_head(out, out_b, out_h, out_n, out_d, HEAD_DIM, BLOCK_D), result, rows, queries)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(logsum + head * queries + rows, top + tl.log2(total), mask=rows < queries)


@triton.jit
def delta(
    out, grad, sums, queries, out_b, out_h, out_n, out_d, grad_b, grad_h, grad_n, grad_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sums [B, heads, tokens] = out . grad, which is the mean of the probabilities' gradient in each row."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = _rows(_head(out, out_b, out_h, out_n, out_d, HEAD_DIM, BLOCK_D), rows, queries).to(SUM)
    do = _rows(_head(grad, grad_b, grad_h, grad_n, grad_d, HEAD_DIM, BLOCK_D), rows, queries).to(SUM)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + head * queries + rows, tl.sum(o * do, 1), mask=rows < queries)


@triton.jit
def _probabilities(
    q, k, do, v, logsum, sums, rows, columns, queries, keys, scale, CAUSAL: tl.constexpr
):  # fmt: skip
    """Probabilities and the scores' gradients of rows x columns; both are zero where nothing is attended to."""
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    base2 = tl.load(logsum + head * queries + rows, mask=rows < queries, other=0.0)
    mean = tl.load(sums + head * queries + rows, mask=rows < queries, other=0.0)
    seen = (rows < queries)[:, None] & (columns < keys)[None, :]
    if CAUSAL:
        seen = seen & (rows[:, None] >= columns[None, :])
    scores = tl.where(seen, dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))
    p = tl.exp2(scores - base2[:, None])
    ds = p * (dot(do, tl.trans(v)) - mean[:, None]) * scale
    return p.to(do.dtype), ds.to(q.dtype)


@triton.jit
def key_backward(
    q, k, v, grad, logsum, sums, grad_k, grad_v, queries, keys,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, grad_b, grad_h, grad_n, grad_d, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v [B, tokens, heads, head_dim], contiguous, of a block of keys: a loop over the queries."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    first = tl.program_id(0) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    key = _rows(_head(k, k_b, k_h, k_n, k_d, HEAD_DIM, BLOCK_D), columns, keys)
    value = _rows(_head(v, v_b, v_h, v_n, v_d, HEAD_DIM, BLOCK_D), columns, keys)
    q_head = _head(q, q_b, q_h, q_n, q_d, HEAD_DIM, BLOCK_D)
    grad_head = _head(grad, grad_b, grad_h, grad_n, grad_d, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    dv = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    begin = 0
    if CAUSAL:
        begin = first // BLOCK_M * BLOCK_M
    for start in range(begin, queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queried, do = _rows(q_head, rows, queries), _rows(grad_head, rows, queries)
        p, ds = _probabilities(queried, key, do, value, logsum, sums, rows, columns, queries, keys, scale, CAUSAL)
        dv += dot(tl.trans(p), do)
        dk += dot(tl.trans(ds), queried)
    row = tl.cast(keys, tl.int64) * HEADS * HEAD_DIM
    _store_rows(_head(grad_k, row, HEAD_DIM, HEADS * HEAD_DIM, 1, HEAD_DIM, BLOCK_D), dk, columns, keys)
    _store_rows(_head(grad_v, row, HEAD_DIM, HEADS * HEAD_DIM, 1, HEAD_DIM, BLOCK_D), dv, columns, keys)


@triton.jit
def query_backward(
    q, k, v, grad, logsum, sums, grad_q, queries, keys,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, grad_b, grad_h, grad_n, grad_d, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q [B, tokens, heads, head_dim], contiguous, of a block of queries: a loop over the keys."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    queried = _rows(_head(q, q_b, q_h, q_n, q_d, HEAD_DIM, BLOCK_D), rows, queries)
    do = _rows(_head(grad, grad_b, grad_h, grad_n, grad_d, HEAD_DIM, BLOCK_D), rows, queries)
    k_head = _head(k, k_b, k_h, k_n, k_d, HEAD_DIM, BLOCK_D)
    v_head = _head(v, v_b, v_h, v_n, v_d, HEAD_DIM, BLOCK_D)
    dq = tl.zeros((BLOCK_M, BLOCK_D), SUM)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key, value = _rows(k_head, columns, keys), _rows(v_head, columns, keys)
        _, ds = _probabilities(queried, key, do, value, logsum, sums, rows, columns, queries, keys, scale, CAUSAL)
        dq += dot(ds, key)
    row = tl.cast(queries, tl.int64) * HEADS * HEAD_DIM
    _store_rows(_head(grad_q, row, HEAD_DIM, HEADS * HEAD_DIM, 1, HEAD_DIM, BLOCK_D), dq, rows, queries)
