"""Window attention: one program computes one window of one head, forward or backward."""

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
def _ptrs(head, o_t, height, width, WINDOW: tl.constexpr):
    """Return pointers to the tokens o_t of this program's window, and the mask of those in the map."""
    p_c, stride_h, stride_w = head
    across = tl.cdiv(width, WINDOW)
    rows = tl.program_id(0) // across * WINDOW + o_t // WINDOW
    columns = tl.program_id(0) % across * WINDOW + o_t % WINDOW
    m_t = (o_t < WINDOW * WINDOW) & (rows < height) & (columns < width)
    o_x = rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w
    return p_c[None, :] + o_x[:, None], m_t


@triton.jit
def _load(head, o_t, m_d, height, width, WINDOW: tl.constexpr):
    """Load tokens [tokens, channels], zero beyond the map; return them and the mask of those in the map."""
    ptrs, m_t = _ptrs(head, o_t, height, width, WINDOW)
    return tl.load(ptrs, mask=m_t[:, None] & m_d[None, :], other=0.0), m_t


@triton.jit
def _projections(qkv, bias, o_t, o_c, m_d, height, width, C, strides, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Load keys or values of the channels o_c; beyond the map they are the bias."""
    stride_b, stride_h, stride_w, stride_c = strides
    b_x, m_t = _load(_head(qkv, o_c, stride_b, stride_h, stride_w, stride_c), o_t, m_d, height, width, WINDOW)
    if PADDED:
        padding = tl.load(bias + o_c, mask=m_d, other=0.0).to(b_x.dtype)
        b_x = tl.where(m_t[:, None], b_x, padding[None, :])
    return b_x


@triton.jit
def _keys_and_values(
    qkv,
    bias,
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
    """Load the keys and values of the window: a block of BLOCK_K0 tokens and, if SECOND, one of BLOCK_K1.

    The last value is the mask of the last block.
    """
    o_k = tl.arange(0, BLOCK_K0)
    b_k0 = _projections(qkv, bias, o_k, o_c + C, m_d, height, width, C, strides, WINDOW, PADDED)
    b_v0 = _projections(qkv, bias, o_k, o_c + 2 * C, m_d, height, width, C, strides, WINDOW, PADDED)
    b_k1, b_v1 = b_k0, b_v0
    if SECOND:
        o_k = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        b_k1 = _projections(qkv, bias, o_k, o_c + C, m_d, height, width, C, strides, WINDOW, PADDED)
        b_v1 = _projections(qkv, bias, o_k, o_c + 2 * C, m_d, height, width, C, strides, WINDOW, PADDED)
    return b_k0, b_k1, b_v0, b_v1, o_k < WINDOW * WINDOW


@triton.jit
def _forward_rows(
    o_t,
    q_head,
    out_head,
    keys,
    height,
    width,
    m_d,
    scale,
    WINDOW: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute and store the attention of the queries o_t. A padding token's query is zero, its result not stored."""
    b_k0, b_k1, b_v0, b_v1, m_k = keys
    b_q, m_t = _load(q_head, o_t, m_d, height, width, WINDOW)
    b_p0, b_p1, row_sum = softmax_two_blocks(b_q, b_k0, b_k1, scale, m_k, SECOND, MASKED)
    ptrs, _ = _ptrs(out_head, o_t, height, width, WINDOW)
    b_o = values_two_blocks(b_p0, b_p1, row_sum, b_v0, b_v1, SECOND).to(ptrs.dtype.element_ty)
    tl.store(ptrs, b_o, mask=m_t[:, None] & m_d[None, :])


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
    BLOCK_Q: tl.constexpr,
):
    """out = softmax(scale q k^T) v within each window: qkv [B, H, W, 3C] strided -> out [B, H, W, C] contiguous.

    Grid: windows, heads, batch.
    """
    MASKED: tl.constexpr = (BLOCK_K0 + BLOCK_K1 if SECOND else BLOCK_K0) > WINDOW * WINDOW
    STEP: tl.constexpr = BLOCK_Q if BLOCK_Q < BLOCK_K0 else BLOCK_K0
    m_d = tl.arange(0, BLOCK_D) < HEAD_DIM
    o_c = tl.program_id(1) * HEAD_DIM + tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_w, stride_c)
    keys = _keys_and_values(qkv, bias, o_c, m_d, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND)
    q_head = _head(qkv, o_c, stride_b, stride_h, stride_w, stride_c)
    out_head = _head(out, o_c, _int64(height) * width * C, _int64(width) * C, C, 1)
    for start in range(0, BLOCK_K0, STEP):
        o_t = start + tl.arange(0, STEP)
        _forward_rows(o_t, q_head, out_head, keys, height, width, m_d, scale, WINDOW, SECOND, MASKED)
    if SECOND:
        o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        _forward_rows(o_t, q_head, out_head, keys, height, width, m_d, scale, WINDOW, SECOND, MASKED)


@triton.jit
def _backward_rows(
    o_t, heads, keys, grads, height, width, m_d, scale, WINDOW: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr
):
    """Store the gradient of the queries o_t, add their part to the gradients of keys and values, and return those.

    With dp = grad v^T: ds = scale p (dp - sum_k p dp), dq = ds k, dk += ds^T q, dv += p^T grad. A padding token has no
    output: its gradient is loaded as zero, so its part is zero.
    """
    q_head, grad_head, out_head = heads
    b_k0, b_k1, b_v0, b_v1, m_k = keys
    b_dk0, b_dk1, b_dv0, b_dv1 = grads
    b_q, m_t = _load(q_head, o_t, m_d, height, width, WINDOW)
    b_do, _ = _load(grad_head, o_t, m_d, height, width, WINDOW)
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
    ptrs, _ = _ptrs(out_head, o_t, height, width, WINDOW)
    tl.store(ptrs, b_dq.to(ptrs.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit
def _store_keys(o_t, out_head, b_dk, b_dv, height, width, C, m_d, WINDOW: tl.constexpr):
    """Store the gradients of the keys and values o_t; return the sums of those that are padding."""
    ptrs, m_t = _ptrs(out_head, o_t, height, width, WINDOW)
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
    keys = _keys_and_values(qkv, bias, o_c, m_d, height, width, C, strides, WINDOW, PADDED, BLOCK_K0, BLOCK_K1, SECOND)
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
            o_t, heads, keys, grads, height, width, m_d, scale, WINDOW, SECOND, MASKED
        )
    if SECOND:
        o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        grads = (b_dk0, b_dk1, b_dv0, b_dv1)
        b_dk0, b_dk1, b_dv0, b_dv1 = _backward_rows(
            o_t, heads, keys, grads, height, width, m_d, scale, WINDOW, SECOND, MASKED
        )

    bias_k, bias_v = _store_keys(tl.arange(0, BLOCK_K0), out_head, b_dk0, b_dv0, height, width, C, m_d, WINDOW)
    if SECOND:
        o_t = BLOCK_K0 + tl.arange(0, BLOCK_K1)
        more_k, more_v = _store_keys(o_t, out_head, b_dk1, b_dv1, height, width, C, m_d, WINDOW)
        bias_k += more_k
        bias_v += more_v
    if PADDED:
        row = padding + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C
        tl.store(row + o_c, bias_k, mask=m_d)
        tl.store(row + C + o_c, bias_v, mask=m_d)
