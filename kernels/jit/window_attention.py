"""Window attention: one program attends within one window for one head, forward or backward."""

import triton
import triton.language as tl

from kernels.jit.common import dot, two_tile_scores, two_tile_values


@triton.jit
def _wide(x):
    return tl.cast(x, tl.int64)


@triton.jit
def _place(tokens, height, width, stride_h, stride_w, WINDOW: tl.constexpr):
    """Offsets (int64) in a map, and whether they lie in it, of tokens numbered along this program's window."""
    across = tl.cdiv(width, WINDOW)
    rows = tl.program_id(0) // across * WINDOW + tokens // WINDOW
    columns = tl.program_id(0) % across * WINDOW + tokens % WINDOW
    inside = (tokens < WINDOW * WINDOW) & (rows < height) & (columns < width)
    return rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w, inside


@triton.jit
def _load(base, bias, offsets, inside, channels, used, stride_c, PADDED: tl.constexpr):
    """Projections [tokens, channels]; beyond the map they are the bias."""
    places = offsets[:, None] + channels.to(tl.int64)[None, :] * stride_c
    x = tl.load(base + places, mask=inside[:, None] & used[None, :], other=0.0)
    if PADDED:
        padding = tl.load(bias + channels, mask=used, other=0.0).to(x.dtype)
        x = tl.where(inside[:, None], x, padding[None, :])
    return x


@triton.jit
def _forward_rows(
    tokens, base, target, bias, k0, k1, v0, v1, valid, height, width, stride_h, stride_w, stride_c, C, c, used, scale,
    WINDOW: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries `tokens`. A padding token's query is whatever the load gives, and not stored."""
    at, inside = _place(tokens, height, width, stride_h, stride_w, WINDOW)
    q = _load(base, bias, at, inside, c, used, stride_c, False)
    p0, p1, total = two_tile_scores(q, k0, k1, scale, valid, SECOND, MASKED)
    o = two_tile_values(p0, p1, total, v0, v1, SECOND).to(target.dtype.element_ty)
    at, inside = _place(tokens, height, width, _wide(width) * C, C, WINDOW)
    tl.store(target + at[:, None] + c[None, :], o, mask=inside[:, None] & used[None, :])


@triton.jit
def forward(
    qkv, bias, out, height, width, C, stride_b, stride_h, stride_w, stride_c, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, SECOND: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """qkv [B, H, W, 3C] strided -> out [B, H, W, C] contiguous. Grid: windows, heads, batch.

    The window's tokens lie in a tile of MAIN and, if SECOND, one of REST.
    """
    MASKED: tl.constexpr = (MAIN + REST if SECOND else MAIN) > WINDOW * WINDOW
    STEP: tl.constexpr = BLOCK_Q if BLOCK_Q < MAIN else MAIN
    base = qkv + tl.program_id(2).to(tl.int64) * stride_b
    target = out + tl.program_id(2).to(tl.int64) * height * width * C
    lanes = tl.arange(0, BLOCK_D)
    used = lanes < HEAD_DIM
    c = tl.program_id(1) * HEAD_DIM + lanes
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    valid = (rest if SECOND else main) < WINDOW * WINDOW

    at, inside = _place(main, height, width, stride_h, stride_w, WINDOW)
    k0 = _load(base, bias, at, inside, c + C, used, stride_c, PADDED)
    v0 = _load(base, bias, at, inside, c + 2 * C, used, stride_c, PADDED)
    k1, v1 = k0, v0
    if SECOND:
        at1, inside1 = _place(rest, height, width, stride_h, stride_w, WINDOW)
        k1 = _load(base, bias, at1, inside1, c + C, used, stride_c, PADDED)
        v1 = _load(base, bias, at1, inside1, c + 2 * C, used, stride_c, PADDED)

    for start in range(0, MAIN, STEP):
        _forward_rows(
            start + tl.arange(0, STEP), base, target, bias, k0, k1, v0, v1, valid, height, width,
            stride_h, stride_w, stride_c, C, c, used, scale, WINDOW, SECOND, MASKED,
        )  # fmt: skip
    if SECOND:
        _forward_rows(
            rest, base, target, bias, k0, k1, v0, v1, valid, height, width,
            stride_h, stride_w, stride_c, C, c, used, scale, WINDOW, SECOND, MASKED,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    tokens, base, grad_base, target, bias, k0, k1, v0, v1, dk0, dk1, dv0, dv1, valid, height, width,
    stride_h, stride_w, stride_c, grad_h, grad_w, grad_c, C, c, used, scale,
    WINDOW: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the queries `tokens`; returns those of keys and values with theirs added.

    A padding token has no output: its gradient loads as zero, and so does all that it would contribute.
    """
    at, inside = _place(tokens, height, width, stride_h, stride_w, WINDOW)
    q = _load(base, bias, at, inside, c, used, stride_c, False)
    at, inside = _place(tokens, height, width, grad_h, grad_w, WINDOW)
    do = _load(grad_base, bias, at, inside, c, used, grad_c, False)
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
    at, inside = _place(tokens, height, width, _wide(width) * 3 * C, 3 * C, WINDOW)
    places = target + at[:, None] + c[None, :]
    tl.store(places, dq.to(target.dtype.element_ty), mask=inside[:, None] & used[None, :])
    return dk0, dk1, dv0, dv1


@triton.jit
def _store_keys(
    tokens, target, dk, dv, height, width, C, c, used, WINDOW: tl.constexpr
):  # fmt: skip
    """Stores the gradients of the keys and values `tokens`; returns the sums of those that are padding."""
    at, inside = _place(tokens, height, width, _wide(width) * 3 * C, 3 * C, WINDOW)
    places = target + at[:, None] + c[None, :]
    mask = inside[:, None] & used[None, :]
    tl.store(places + C, dk.to(target.dtype.element_ty), mask=mask)
    tl.store(places + 2 * C, dv.to(target.dtype.element_ty), mask=mask)
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
    batch = tl.program_id(2).to(tl.int64)
    base = qkv + batch * stride_b
    grad_base = grad + batch * grad_b
    target = grad_qkv + batch * height * width * 3 * C
    lanes = tl.arange(0, BLOCK_D)
    used = lanes < HEAD_DIM
    c = tl.program_id(1) * HEAD_DIM + lanes
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    valid = (rest if SECOND else main) < WINDOW * WINDOW

    at, inside = _place(main, height, width, stride_h, stride_w, WINDOW)
    k0 = _load(base, bias, at, inside, c + C, used, stride_c, PADDED)
    v0 = _load(base, bias, at, inside, c + 2 * C, used, stride_c, PADDED)
    k1, v1 = k0, v0
    if SECOND:
        at1, inside1 = _place(rest, height, width, stride_h, stride_w, WINDOW)
        k1 = _load(base, bias, at1, inside1, c + C, used, stride_c, PADDED)
        v1 = _load(base, bias, at1, inside1, c + 2 * C, used, stride_c, PADDED)
    dk0 = tl.zeros((MAIN, BLOCK_D), SUM)
    dv0 = tl.zeros((MAIN, BLOCK_D), SUM)
    dk1 = tl.zeros((REST, BLOCK_D), SUM)
    dv1 = tl.zeros((REST, BLOCK_D), SUM)

    for start in range(0, MAIN, STEP):
        dk0, dk1, dv0, dv1 = _backward_rows(
            start + tl.arange(0, STEP), base, grad_base, target, bias, k0, k1, v0, v1, dk0, dk1, dv0, dv1, valid,
            height, width, stride_h, stride_w, stride_c, grad_h, grad_w, grad_c, C, c, used, scale,
            WINDOW, SECOND, MASKED,
        )  # fmt: skip
    if SECOND:
        dk0, dk1, dv0, dv1 = _backward_rows(
            rest, base, grad_base, target, bias, k0, k1, v0, v1, dk0, dk1, dv0, dv1, valid,
            height, width, stride_h, stride_w, stride_c, grad_h, grad_w, grad_c, C, c, used, scale,
            WINDOW, SECOND, MASKED,
        )  # fmt: skip

    bias_k, bias_v = _store_keys(main, target, dk0, dv0, height, width, C, c, used, WINDOW)
    if SECOND:
        more_k, more_v = _store_keys(rest, target, dk1, dv1, height, width, C, c, used, WINDOW)
        bias_k += more_k
        bias_v += more_v
    if PADDED:
        row = padding + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * C
        tl.store(row + c, bias_k, mask=used)
        tl.store(row + C + c, bias_v, mask=used)
