"""A value times the GELU of its gate, element by element."""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, out, width, row_stride, column_stride, BLOCK: tl.constexpr, DOUBLE: tl.constexpr
):  # fmt: skip
    """x [rows, 2 * width] strided: values, then gates -> out [rows, width] contiguous. Grid: rows, blocks."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = columns < width
    places = x + row * row_stride + columns * column_stride
    value = tl.load(places, mask=mask, other=0.0).to(SUM)
    gate = tl.load(places + tl.cast(width, tl.int64) * column_stride, mask=mask, other=0.0).to(SUM)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * width + columns, (value * gelu).to(out.dtype.element_ty), mask=mask)
