"""Quantize rows to 8-bit floats (E4M3), each with its own scale."""

import triton
import triton.language as tl


@triton.jit
def quantize(
    x,
    out,
    scale,
    rows,
    columns,
    row_stride,
    column_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """scale = max |v| / 448 and out = v / scale of each row, with v = x or, if GELU, x (1 + erf(x / sqrt(2))) / 2.

    x [rows, columns] strided -> out [rows, columns] E4M3 and scale [rows] float32, contiguous. Grid: tiles of ROWS.
    """
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK).to(tl.int64)
    mask = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    b_x = tl.load(x + o_r[:, None] * row_stride + o_c[None, :] * column_stride, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        b_x = 0.5 * b_x * (1 + tl.erf(b_x * 0.7071067811865476))
    b_s = tl.maximum(tl.max(tl.abs(b_x), 1) / 448.0, 7.888609052210118e-31)  # 2^-100, for a row of zeros
    b_q = tl.div_rn(b_x, tl.broadcast_to(b_s[:, None], (ROWS, BLOCK))).to(tl.float8e4nv)
    tl.store(scale + o_r, b_s, mask=o_r < rows)
    tl.store(out + o_r[:, None] * columns + o_c[None, :], b_q, mask=mask)
