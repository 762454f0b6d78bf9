"""Window attention: one program attends within one window for one head, forward or backward."""

import triton
import triton.language as tl

from kernels.triton.common import dot, two_tile_scores, two_tile_values


@triton.jit
def _wide(x):
    return tl.cast(x, tl.int64)


@triton.jit
def _head(x, channels, stride_b, stride_h, stride_w, stride_c):
    """Of this program's picture: pointers to the first token's `channels`, and the strides of rows and columns."""
    first = x + tl.program_id(2).to(tl.int64) * stride_b
    return first + channels.to(tl.int64) * stride_c, _wide(stride_h), _wide(stride_w)


@triton.jit
def _places(head, tokens, height, width, WINDOW: tl.constexpr):
    """Pointers to tokens numbered along this program's window, and whether they lie in the map."""
    pointers, stride_h, stride_w = head
    across = tl.cdiv(width, WINDOW)
    rows = tl.program_id(0) // across * WINDOW + tokens // WINDOW
    columns = tl.program_id(0) % across * WINDOW + tokens % WINDOW
    inside = (tokens < WINDOW * WINDOW) & (rows < height) & (columns < width)
    at = rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w
    return pointers[None, :] + at[:, None], inside


@triton.jit
def _load(head, tokens, used, height, width, WINDOW: tl.constexpr):
    """Tokens [tokens, channels]; zero beyond the map, and whether they lie in it."""
    places, inside = _places(head, tokens, height, width, WINDOW)
    return tl.load(places, mask=inside[:, None] & used[None, :], other=0.0), inside


@triton.jit
def _projections(qkv, bias, tokens, c, used, height, width, C, strides, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Keys or values, whose first channel is c[0]; beyond the map they are the bias."""
    stride_b, stride_h, stride_w, stride_c = strides
    x, inside = _load(_head(qkv, c, stride_b, stride_h, stride_w, stride_c), tokens, used, height, width, WINDOW)
    if PADDED:
        padding = tl.load(bias + c, mask=used, other=0.0).to(x.dtype)
        x = tl.where(inside[:, None], x, padding[None, :])
    return x


@triton.jit
def _keys_and_values(
    qkv, bias, c, used, height, width, C, strides, WINDOW: tl.constexpr, PADDED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Those of the whole window, in a tile of MAIN tokens and, if SECOND, one of REST; and which of the last count."""
    last = tl.arange(0, MAIN)
    k0 = _projections(qkv, bias, last, c + C, used, height, width, C, strides, WINDOW, PADDED)
    v0 = _projections(qkv, bias, last, c + 2 * C, used, height, width, C, strides, WINDOW, PADDED)
    k1, v1 = k0, v0
    if SECOND:
        last = MAIN + tl.arange(0, REST)
        k1 = _projections(qkv, bias, last, c + C, used, height, width, C, strides, WINDOW, PADDED)
        v1 = _projections(qkv, bias, last, c + 2 * C, used, height, width, C, strides, WINDOW, PADDED)
    return k0, k1, v0, v1, last < WINDOW * WINDOW


@triton.jit
def _forward_rows(
    tokens, q_head, out_head, keys, height, width, used, scale,
    WINDOW: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries `tokens`. A padding token's query is zero, and what comes of it not stored."""
    k0, k1, v0, v1, valid = keys
    q, inside = _load(q_head, tokens, used, height, width, WINDOW)
    p0, p1, total = two_tile_scores(q, k0, k1, scale, valid, SECOND, MASKED)
    places, _ = _places(out_head, tokens, height, width, WINDOW)
    o = two_tile_values(p0, p1, total, v0, v1, SECOND).to(places.dtype.element_ty)
    tl.store(places, o, mask=inside[:, None] & used[None, :])


@triton.jit
def forward(
    qkv, bias, out, height, width, C, stride_b, stride_h, stride_w, stride_c, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, SECOND: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """qkv [B, H, W, 3C] strided -> out [B, H, W, C] contiguous. Grid: windows, heads, batch."""
    MASKED: tl.constexpr = (MAIN + REST if SECOND else MAIN) > WINDOW * WINDOW
    STEP: tl.constexpr = BLOCK_Q if BLOCK_Q < MAIN else MAIN
    used = tl.arange(0, BLOCK_D) < HEAD_DIM
    c = tl.program_id(1) * HEAD_DIM + tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_w, stride_c)
    keys = _keys_and_values(qkv, bias, c, used, height, width, C, strides, WINDOW, PADDED, MAIN, REST, SECOND)
    q_head = _head(qkv, c, stride_b, stride_h, stride_w, stride_c)
    out_head = _head(out, c, _wide(height) * width * C, _wide(width) * C, C, 1)
    for start in range(0, MAIN, STEP):
        tokens = start + tl.arange(0, STEP)
        _forward_rows(tokens, q_head, out_head, keys, height, width, used, scale, WINDOW, SECOND, MASKED)
    if SECOND:
        tokens = MAIN + tl.arange(0, REST)
        _forward_rows(tokens, q_head, out_head, keys, height, width, used, scale, WINDOW, SECOND, MASKED)


@triton.jit
def _backward_rows(
    tokens, q_head, grad_head, target, keys, dk0, dk1, dv0, dv1, height, width, used, scale,
    WINDOW: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the queries `tokens`; returns those of keys and values with theirs added.

    A padding token has no output: its gradient loads as zero, and so does all that it would contribute.
    """
    k0, k1, v0, v1, valid = keys
    q, inside = _load(q_head, tokens, used, height, width, WINDOW)
    do, _ = _load(grad_head, tokens, used, height, width, WINDOW)
    p0, p1, total = two_tile_scores(q, k0, k1, scale * 1.4426950408889634, valid, SECOND, MASKED)
    p0 = p0 / total[:, None]
    dp0 = dot(do, tl.trans(v0))
    mean = tl.sum(p0 * dp0, 1)
    dv0 += dot(tl.trans(p0.to(do.dtype)), do)
    if SECOND:
        p1 = p1 / total[:, None]
        dp1 = dot(do, tl.trans(v1))
        mean += tl.sum(p1 * dp1, 1)
        dv1 += dot(tl.trans(p1.to(do.dtype)), do)
    ds0 = (p0 * (dp0 - mean[:, None]) * scale).to(q.dtype)
    dq = dot(ds0, k0)
    dk0 += dot(tl.trans(ds0), q)
    if SECOND:
        ds1 = (p1 * (dp1 - mean[:, None]) * scale).to(q.dtype)
        dq += dot(ds1, k1)
        dk1 += dot(tl.trans(ds1), q)
    places, _ = _places(target, tokens, height, width, WINDOW)
    tl.store(places, dq.to(places.dtype.element_ty), mask=inside[:, None] & used[None, :])
    return dk0, dk1, dv0, dv1


@triton.jit
def _store_keys(tokens, target, dk, dv, height, width, C, used, WINDOW: tl.constexpr):
    """Stores the gradients of the keys and values `tokens`; returns the sums of those that are padding."""
    places, inside = _places(target, tokens, height, width, WINDOW)
    mask = inside[:, None] & used[None, :]
    tl.store(places + C, dk.to(places.dtype.element_ty), mask=mask)
    tl.store(places + 2 * C, dv.to(places.dtype.element_ty), mask=mask)
    outside = (~inside & (tokens < WINDOW * WINDOW))[:, None]
    return tl.sum(tl.where(outside, dk, 0.0), 0), tl.sum(tl.where(outside, dv, 0.0), 0)


@triton.jit
def backward(
    qkv, bias, grad, grad_qkv, padding, height, width, C,
    stride_b, stride_h, stride_w, stride_c, grad_b, grad_h, grad_w, grad_c, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, SECOND: tl.constexpr, BLOCK_Q: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """grad [B, H, W, C] strided -> grad_qkv [B, H, W, 3C] contiguous; the softmax is computed again.

    padding [B, windows, 2C] is each window's share of the bias's gradient: its padding's keys and values.
    """
    MASKED: tl.constexpr = (MAIN + REST if SECOND else MAIN) > WINDOW * WINDOW
    STEP: tl.constexpr = BLOCK_Q if BLOCK_Q < MAIN else MAIN
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    used = tl.arange(0, BLOCK_D) < HEAD_DIM
    c = tl.program_id(1) * HEAD_DIM + tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_w, stride_c)
    keys = _keys_and_values(qkv, bias, c, used, height, width, C, strides, WINDOW, PADDED, MAIN, REST, SECOND)
    q_head = _head(qkv, c, stride_b, stride_h, stride_w, stride_c)
    grad_head = _head(grad, c, grad_b, grad_h, grad_w, grad_c)
    target = _head(grad_qkv, c, _wide(height) * width * 3 * C, _wide(width) * 3 * C, 3 * C, 1)
    dk0 = tl.zeros((MAIN, BLOCK_D), SUM)
    dv0 = tl.zeros((MAIN, BLOCK_D), SUM)
    dk1 = tl.zeros((REST, BLOCK_D), SUM)
    dv1 = tl.zeros((REST, BLOCK_D), SUM)
    for start in range(0, MAIN, STEP):
        dk0, dk1, dv0, dv1 = _backward_rows(
            start + tl.arange(0, STEP), q_head, grad_head, target, keys, dk0, dk1, dv0, dv1, height, width, used, scale,
            WINDOW, SECOND, MASKED,
        )  # fmt: skip
    if SECOND:
        dk0, dk1, dv0, dv1 = _backward_rows(
            MAIN + tl.arange(0, REST), q_head, grad_head, target, keys, dk0, dk1, dv0, dv1, height, width, used, scale,
            WINDOW, SECOND, MASKED,
        )  # fmt: skip

    bias_k, bias_v = _store_keys(tl.arange(0, MAIN), target, dk0, dv0, height, width, C, used, WINDOW)
    if SECOND:
        rest = MAIN + tl.arange(0, REST)
        more_k, more_v = _store_keys(rest, target, dk1, dv1, height, width, C, used, WINDOW)
        bias_k += more_k
        bias_v += more_v
    if PADDED:
        row = padding + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C
        tl.store(row + c, bias_k, mask=used)
        tl.store(row + C + c, bias_v, mask=used)
