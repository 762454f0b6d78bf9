"""Attention of many queries to few keys, all of which stay on the chip."""

import triton
import triton.language as tl

from kernels.triton.common import two_tile_scores, two_tile_values


@triton.jit
def _load(base, rows, count, stride_n, lanes, used, stride_d):
    offsets = rows.to(tl.int64)[:, None] * stride_n + lanes.to(tl.int64)[None, :] * stride_d
    return tl.load(base + offsets, mask=(rows < count)[:, None] & used[None, :], other=0.0)


@triton.jit
def forward(
    q, k, v, out, queries, row, q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, scale,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, SECOND: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """q [B, M, heads, d], k and v [B, KEYS, heads, d], strided -> out [B, M, row = heads * d] contiguous.

    The keys lie in a tile of MAIN and, if SECOND, one of REST: 77 in 64 + 16. Grid: blocks of queries, heads, batch.
    """
    MASKED: tl.constexpr = (MAIN + REST if SECOND else MAIN) > KEYS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    used = lanes < HEAD_DIM
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    valid = (rest if SECOND else main) < KEYS
    k_base, v_base = k + batch * k_b + head * k_h, v + batch * v_b + head * v_h
    k0 = _load(k_base, main, KEYS, k_n, lanes, used, k_d)
    v0 = _load(v_base, main, KEYS, v_n, lanes, used, v_d)
    k1, v1 = k0, v0
    if SECOND:
        k1 = _load(k_base, rest, KEYS, k_n, lanes, used, k_d)
        v1 = _load(v_base, rest, KEYS, v_n, lanes, used, v_d)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    queried = _load(q + batch * q_b + head * q_h, rows, queries, q_n, lanes, used, q_d)
    p0, p1, total = two_tile_scores(queried, k0, k1, scale, valid, SECOND, MASKED)
    result = two_tile_values(p0, p1, total, v0, v1, SECOND).to(out.dtype.element_ty)
    at = (batch * queries + rows)[:, None] * row + head * HEAD_DIM + lanes[None, :]
    tl.store(out + at, result, mask=(rows < queries)[:, None] & used[None, :])
