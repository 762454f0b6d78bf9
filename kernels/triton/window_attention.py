"""Window attention, forward in four designs and backward.

A window of 12 x 12 tokens is 144 queries and keys: 128 + 16, or nine tiles of 16. Designs of `forward`:

    0 rows      a program computes one window of one head, in tiles of BLOCK_Q queries shared by all its warps
    1 heads     GROUP heads of a window, each in a warp of its own (num_warps = GROUP), in tiles of 16 queries: no
                reduction crosses warps, and what neighbouring heads read lies side by side in memory
    2 tails     GROUP heads of a window: the first 128 queries of each by all warps, the last 16 of each head in a warp
                of its own (num_warps = GROUP), so that no tile is mostly padding
    3 windows   two windows of one head: the loads of both are in flight before the first is computed

Design 4 is kernels/cuda/window_attention.cu; here it is design 0, for the tensors that the other does not take.
"""

import triton
import triton.language as tl

from kernels.triton.common import dot, softmax_two_blocks, values_two_blocks


@triton.jit
def _int64(x):
    return tl.cast(x, tl.int64)


@triton.jit
def _head(x, o_c, stride_b, stride_h, stride_w, stride_c):
    """Return, of this program's image: pointers to the first token's channels o_c, the strides of rows and columns."""
    p_image = x + tl.program_id(2).to(tl.int64) * stride_b
    return p_image + o_c.to(tl.int64) * stride_c, _int64(stride_h), _int64(stride_w)


@triton.jit
def _ptrs(head, i_w, o_t, height, width, WINDOW: tl.constexpr):
    """Return pointers to the tokens o_t of window i_w, [tokens, D] or [G, tokens, D], and the mask of those in the map.

    The head's pointers are to channels [D], or to those of several heads [G, D].
    """
    p_c, stride_h, stride_w = head
    across = tl.cdiv(width, WINDOW)
    rows = i_w // across * WINDOW + o_t // WINDOW
    columns = i_w % across * WINDOW + o_t % WINDOW
    m_t = (o_t < WINDOW * WINDOW) & (rows < height) & (columns < width)
    o_x = rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w
    return tl.expand_dims(p_c, len(p_c.shape) - 1) + o_x[:, None], m_t


@triton.jit
def _load(head, i_w, o_t, m_d, height, width, WINDOW: tl.constexpr):
    """Load tokens, zero beyond the map; return them and the mask of those in the map. m_d: the channels that exist."""
    ptrs, m_t = _ptrs(head, i_w, o_t, height, width, WINDOW)
    return tl.load(ptrs, mask=m_t[:, None] & tl.expand_dims(m_d, len(m_d.shape) - 1), other=0.0), m_t


@triton.jit
def _projections(qkv, bias, i_w, o_t, o_c, m_d, height, width, strides, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Load keys or values of the channels o_c; beyond the map they are the bias."""
    stride_b, stride_h, stride_w, stride_c = strides
    b_x, m_t = _load(_head(qkv, o_c, stride_b, stride_h, stride_w, stride_c), i_w, o_t, m_d, height, width, WINDOW)
    if PADDED:
        padding = tl.load(bias + o_c, mask=m_d, other=0.0).to(b_x.dtype)
        b_x = tl.where(m_t[:, None], b_x, tl.expand_dims(padding, len(padding.shape) - 1))
    return b_x


@triton.jit
def _keys_and_values(
    qkv,
    bias,
    i_w,
    o_c,
    m_d,
    height,
    width,
    C,
    strides,
    WINDOW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Load the keys and values of a window: a block of BLOCK_K0 tokens and, if SECOND, one of BLOCK_K1.

    The last value is the mask of the last block.
    """
    o_k = tl.arange(0, BLOCK_K0)
    b_k0 = _projections(qkv, bias, i_w, o_k, o_c + C, m_d, height, width, strides, WINDOW, PADDED)
    b_v0 = _projections(qkv, bias, i_w, o_k, o_c + 2 * C, m_d, height, width, strides, WINDOW, PADDED)
    b_k1, b_v1 = b_k0, b_v0
    if SECOND:
        o_k = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        b_k1 = _projections(qkv, bias, i_w, o_k, o_c + C, m_d, height, width, strides, WINDOW, PADDED)
        b_v1 = _projections(qkv, bias, i_w, o_k, o_c + 2 * C, m_d, height, width, strides, WINDOW, PADDED)
    return b_k0, b_k1, b_v0, b_v1, o_k < WINDOW * WINDOW


@triton.jit
def _attend(
    b_q,
    m_t,
    out_head,
    i_w,
    o_t,
    keys,
    height,
    width,
    m_d,
    scale,
    WINDOW: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute and store the attention of the queries b_q. A padding token's query is zero, its result not stored."""
    b_k0, b_k1, b_v0, b_v1, m_k = keys
    b_p0, b_p1, row_sum = softmax_two_blocks(b_q, b_k0, b_k1, scale, m_k, SECOND, MASKED)
    ptrs, _ = _ptrs(out_head, i_w, o_t, height, width, WINDOW)
    b_o = values_two_blocks(b_p0, b_p1, row_sum, b_v0, b_v1, SECOND).to(ptrs.dtype.element_ty)
    tl.store(ptrs, b_o, mask=m_t[:, None] & tl.expand_dims(m_d, len(m_d.shape) - 1))


@triton.jit
def _attend_rows(
    q_head,
    out_head,
    i_w,
    keys,
    height,
    width,
    m_d,
    scale,
    END: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute the queries 0 to END of a window in tiles of STEP; the next tile is loaded before one is computed."""
    o_t = tl.arange(0, STEP)
    b_q, m_t = _load(q_head, i_w, o_t, m_d, height, width, WINDOW)
    for start in range(0, END, STEP):
        o_t = start + tl.arange(0, STEP)
        b_next, m_next = _load(q_head, i_w, o_t + STEP, m_d, height, width, WINDOW)
        _attend(b_q, m_t, out_head, i_w, o_t, keys, height, width, m_d, scale, WINDOW, SECOND, MASKED)
        b_q, m_t = b_next, m_next


@triton.jit
def _attend_window(
    q_head,
    out_head,
    i_w,
    keys,
    height,
    width,
    m_d,
    scale,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute all queries of one head of a window: those of the first block in tiles of STEP, then the last block."""
    _attend_rows(q_head, out_head, i_w, keys, height, width, m_d, scale, BLOCK_K0, STEP, WINDOW, SECOND, MASKED)
    if SECOND:
        o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        b_q, m_t = _load(q_head, i_w, o_t, m_d, height, width, WINDOW)
        _attend(b_q, m_t, out_head, i_w, o_t, keys, height, width, m_d, scale, WINDOW, SECOND, MASKED)


@triton.jit
def forward(
    qkv,
    bias,
    out,
    height,
    width,
    C,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    SECOND: tl.constexpr,
    DESIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """out = softmax(scale q k^T) v within each window: qkv [B, H, W, 3C] strided -> out [B, H, W, C] contiguous.

    Grid of design 0: windows, heads, batch; of 1 and 2: windows x groups of heads, 1, batch; of 3: pairs of windows,
    heads, batch.
    """
    MASKED: tl.constexpr = (BLOCK_K0 + BLOCK_K1 if SECOND else BLOCK_K0) > WINDOW * WINDOW
    STEP: tl.constexpr = BLOCK_Q if BLOCK_Q < BLOCK_K0 else BLOCK_K0
    TILES: tl.constexpr = (WINDOW * WINDOW + STEP - 1) // STEP * STEP
    strides = (stride_b, stride_h, stride_w, stride_c)
    o_d = tl.arange(0, BLOCK_D)
    if DESIGN == 1 or DESIGN == 2:
        heads = C // HEAD_DIM
        groups = tl.cdiv(heads, GROUP)
        i_w = tl.program_id(0) // groups
        first = tl.program_id(0) % groups * GROUP
        o_h = first + tl.arange(0, GROUP)
        # of several heads: [GROUP, D]
        o_gc = o_h[:, None] * HEAD_DIM + o_d[None, :]
        m_gd = (o_h < heads)[:, None] & (o_d < HEAD_DIM)[None, :]
        q_heads = _head(qkv, o_gc, stride_b, stride_h, stride_w, stride_c)
        out_heads = _head(out, o_gc, _int64(height) * width * C, _int64(width) * C, C, 1)
    if DESIGN == 1:
        keys = _keys_and_values(
            qkv, bias, i_w, o_gc, m_gd, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND
        )
        _attend_rows(q_heads, out_heads, i_w, keys, height, width, m_gd, scale, TILES, STEP, WINDOW, SECOND, MASKED)
    elif DESIGN == 2:
        for head in range(first, tl.minimum(first + GROUP, heads)):
            o_c = head * HEAD_DIM + o_d
            m_d = o_d < HEAD_DIM
            keys = _keys_and_values(
                qkv, bias, i_w, o_c, m_d, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND
            )
            q_head = _head(qkv, o_c, stride_b, stride_h, stride_w, stride_c)
            out_head = _head(out, o_c, _int64(height) * width * C, _int64(width) * C, C, 1)
            _attend_rows(q_head, out_head, i_w, keys, height, width, m_d, scale, BLOCK_K0, STEP, WINDOW, SECOND, MASKED)
        if SECOND:
            keys = _keys_and_values(
                qkv, bias, i_w, o_gc, m_gd, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND
            )
            o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
            b_q, m_t = _load(q_heads, i_w, o_t, m_gd, height, width, WINDOW)
            _attend(b_q, m_t, out_heads, i_w, o_t, keys, height, width, m_gd, scale, WINDOW, SECOND, MASKED)
    else:
        m_d = o_d < HEAD_DIM
        o_c = tl.program_id(1) * HEAD_DIM + o_d
        q_head = _head(qkv, o_c, stride_b, stride_h, stride_w, stride_c)
        out_head = _head(out, o_c, _int64(height) * width * C, _int64(width) * C, C, 1)
        i_w = tl.program_id(0) * 2 if DESIGN == 3 else tl.program_id(0)
        keys = _keys_and_values(
            qkv, bias, i_w, o_c, m_d, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND
        )
        if DESIGN == 3:
            more_keys = _keys_and_values(
                qkv, bias, i_w + 1, o_c, m_d, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND
            )
            _attend_window(
                q_head, out_head, i_w, keys, height, width, m_d, scale, BLOCK_K0, BLOCK_K1, STEP, WINDOW, SECOND, MASKED
            )
            i_w += 1
            keys = more_keys
        _attend_window(
            q_head, out_head, i_w, keys, height, width, m_d, scale, BLOCK_K0, BLOCK_K1, STEP, WINDOW, SECOND, MASKED
        )


@triton.jit
def _backward_rows(
    i_w,
    o_t,
    heads,
    keys,
    grads,
    height,
    width,
    m_d,
    scale,
    WINDOW: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Store the gradient of the queries o_t, add their part to the gradients of keys and values, and return those.

    With dp = grad v^T: ds = scale p (dp - sum_k p dp), dq = ds k, dk += ds^T q, dv += p^T grad. A padding token has no
    output: its gradient is loaded as zero, so its part is zero.
    """
    q_head, grad_head, out_head = heads
    b_k0, b_k1, b_v0, b_v1, m_k = keys
    b_dk0, b_dk1, b_dv0, b_dv1 = grads
    b_q, m_t = _load(q_head, i_w, o_t, m_d, height, width, WINDOW)
    b_do, _ = _load(grad_head, i_w, o_t, m_d, height, width, WINDOW)
    b_p0, b_p1, row_sum = softmax_two_blocks(b_q, b_k0, b_k1, scale * 1.4426950408889634, m_k, SECOND, MASKED)
    b_p0 = b_p0 / row_sum[:, None]
    b_dp0 = dot(b_do, tl.trans(b_v0))
    mean = tl.sum(b_p0 * b_dp0, 1)
    b_dv0 += dot(tl.trans(b_p0.to(b_do.dtype)), b_do)
    if SECOND:
        b_p1 = b_p1 / row_sum[:, None]
        b_dp1 = dot(b_do, tl.trans(b_v1))
        mean += tl.sum(b_p1 * b_dp1, 1)
        b_dv1 += dot(tl.trans(b_p1.to(b_do.dtype)), b_do)
    b_ds0 = (b_p0 * (b_dp0 - mean[:, None]) * scale).to(b_q.dtype)
    b_dq = dot(b_ds0, b_k0)
    b_dk0 += dot(tl.trans(b_ds0), b_q)
    if SECOND:
        b_ds1 = (b_p1 * (b_dp1 - mean[:, None]) * scale).to(b_q.dtype)
        b_dq += dot(b_ds1, b_k1)
        b_dk1 += dot(tl.trans(b_ds1), b_q)
    ptrs, _ = _ptrs(out_head, i_w, o_t, height, width, WINDOW)
    tl.store(ptrs, b_dq.to(ptrs.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit
def _store_keys(i_w, o_t, out_head, b_dk, b_dv, height, width, C, m_d, WINDOW: tl.constexpr):
    """Store the gradients of the keys and values o_t; return the sums of those that are padding."""
    ptrs, m_t = _ptrs(out_head, i_w, o_t, height, width, WINDOW)
    mask = m_t[:, None] & m_d[None, :]
    tl.store(ptrs + C, b_dk.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + 2 * C, b_dv.to(ptrs.dtype.element_ty), mask=mask)
    outside = (~m_t & (o_t < WINDOW * WINDOW))[:, None]
    return tl.sum(tl.where(outside, b_dk, 0.0), 0), tl.sum(tl.where(outside, b_dv, 0.0), 0)


@triton.jit
def backward(
    qkv,
    bias,
    grad,
    grad_qkv,
    padding,
    height,
    width,
    C,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    grad_b,
    grad_h,
    grad_w,
    grad_c,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """grad [B, H, W, C] strided -> grad_qkv [B, H, W, 3C] contiguous; the softmax is computed again.

    padding [B, windows, 2C] is each window's part of the bias's gradient: that of its padding's keys and values.
    """
    MASKED: tl.constexpr = (BLOCK_K0 + BLOCK_K1 if SECOND else BLOCK_K0) > WINDOW * WINDOW
    STEP: tl.constexpr = BLOCK_Q if BLOCK_Q < BLOCK_K0 else BLOCK_K0
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    m_d = tl.arange(0, BLOCK_D) < HEAD_DIM
    o_c = tl.program_id(1) * HEAD_DIM + tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_w, stride_c)
    i_w = tl.program_id(0)
    keys = _keys_and_values(
        qkv, bias, i_w, o_c, m_d, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND
    )
    q_head = _head(qkv, o_c, stride_b, stride_h, stride_w, stride_c)
    grad_head = _head(grad, o_c, grad_b, grad_h, grad_w, grad_c)
    out_head = _head(grad_qkv, o_c, _int64(height) * width * 3 * C, _int64(width) * 3 * C, 3 * C, 1)
    b_dk0 = tl.zeros((BLOCK_K0, BLOCK_D), SUM)
    b_dv0 = tl.zeros((BLOCK_K0, BLOCK_D), SUM)
    b_dk1 = tl.zeros((BLOCK_K1, BLOCK_D), SUM)
    b_dv1 = tl.zeros((BLOCK_K1, BLOCK_D), SUM)
    heads = (q_head, grad_head, out_head)
    for start in range(0, BLOCK_K0, STEP):
        o_t = start + tl.arange(0, STEP)
        grads = (b_dk0, b_dk1, b_dv0, b_dv1)
        b_dk0, b_dk1, b_dv0, b_dv1 = _backward_rows(
            i_w, o_t, heads, keys, grads, height, width, m_d, scale, WINDOW, SECOND, MASKED
        )
    if SECOND:
        o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        grads = (b_dk0, b_dk1, b_dv0, b_dv1)
        b_dk0, b_dk1, b_dv0, b_dv1 = _backward_rows(
            i_w, o_t, heads, keys, grads, height, width, m_d, scale, WINDOW, SECOND, MASKED
        )

    bias_k, bias_v = _store_keys(i_w, tl.arange(0, BLOCK_K0), out_head, b_dk0, b_dv0, height, width, C, m_d, WINDOW)
    if SECOND:
        o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        more_k, more_v = _store_keys(i_w, o_t, out_head, b_dk1, b_dv1, height, width, C, m_d, WINDOW)
        bias_k += more_k
        bias_v += more_v
    if PADDED:
        row = padding + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C
        tl.store(row + o_c, bias_k, mask=m_d)
        tl.store(row + C + o_c, bias_v, mask=m_d)
