"""A value times the GELU of its gate, element by element."""

import triton
import triton.language as tl


@triton.jit
def forward(x, out, width, row_stride, column_stride, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    """out = value * gate * (1 + erf(gate / sqrt(2))) / 2.

    x [rows, 2 * width] strided: values, then gates -> out [rows, width] contiguous. Grid: rows, blocks.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    o_f = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_f = o_f < width
    p_x = x + row * row_stride + o_f * column_stride
    b_value = tl.load(p_x, mask=m_f, other=0.0).to(SUM)
    b_gate = tl.load(p_x + tl.cast(width, tl.int64) * column_stride, mask=m_f, other=0.0).to(SUM)
    b_gelu = 0.5 * b_gate * (1 + tl.erf(b_gate * 0.7071067811865476))
    tl.store(out + row * width + o_f, (b_value * b_gelu).to(out.dtype.element_ty), mask=m_f)
