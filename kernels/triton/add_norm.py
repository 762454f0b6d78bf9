"""Residual sum and LayerNorm of rows; a row stays in registers between the two."""

import triton
import triton.language as tl


@triton.jit
def forward(
    x,
    residual,
    weight,
    bias,
    y,
    normed,
    rows,
    period,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REPEATS: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = x + residual and normed = (y - mean) / sqrt(var + eps) * weight + bias: all [rows, C] contiguous.

    If REPEATS, residual has `period` rows, added to every `period` rows of x. y is written only if KEEP_SUM.
    Grid: tiles of ROWS rows.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    o_y = o_r[:, None] * C + o_c[None, :]
    m_y = (o_r < rows)[:, None] & m_c[None, :]
    o_x = o_y
    if REPEATS:
        o_x = ((tl.program_id(0) * ROWS + tl.arange(0, ROWS)) % period).to(tl.int64)[:, None] * C + o_c[None, :]
    b_x = tl.load(x + o_y, mask=m_y, other=0.0).to(SUM) + tl.load(residual + o_x, mask=m_y, other=0.0).to(SUM)
    # rounded, as an addition before the norm would store it
    b_out = b_x.to(normed.dtype.element_ty)
    if KEEP_SUM:
        tl.store(y + o_y, b_out, mask=m_y)
    b_x = b_out.to(SUM)
    b_x = tl.where(m_c[None, :], b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / C + eps)
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(SUM)
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(SUM)
    b_n = b_x * scale[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(normed + o_y, b_n.to(normed.dtype.element_ty), mask=m_y)
