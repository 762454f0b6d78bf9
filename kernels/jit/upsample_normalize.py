"""Bicubic upsampling of grey levels in whole numbers, as Pillow computes it, and their normalisation."""

import triton
import triton.language as tl


@triton.jit
def _first_tap(target, SIZE: tl.constexpr, TARGET: tl.constexpr):
    """The first of the four source places under the bicubic filter around `target` (may lie before the border)."""
    # floor((target + 0.5) * SIZE / TARGET - 2.5) + 1, in whole numbers that stay positive
    return ((2 * target + 1) * SIZE + TARGET) // (2 * TARGET) - 2


@triton.jit
def _tap(resize, target, source, valid, SIZE: tl.constexpr):
    """The filter's weight of `source` at `target`, as Pillow's 22-bit whole number; zero beyond the border."""
    inside = valid & (source >= 0) & (source < SIZE)
    weight = tl.load(resize + target * SIZE + source, mask=inside, other=0.0)
    return (weight * 4194304.0).to(tl.int32), inside


@triton.jit
def _level(total):
    """Pillow's rounding of a sum of 22-bit taps to a grey level."""
    return tl.minimum(tl.maximum((total + 2097152) >> 22, 0), 255)


@triton.jit
def forward(
    pixels, resize, mean, std, out, stride_b, stride_c, stride_y, stride_x,
    SIZE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pixels uint8 [B, 3, SIZE, SIZE] strided -> out [B, TARGET, TARGET, 3] contiguous. Grid: columns, rows, batch."""
    batch = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = x < TARGET
    first_y, first_x = _first_tap(y, SIZE, TARGET), _first_tap(x, SIZE, TARGET)
    for channel in tl.static_range(3):
        base = pixels + batch * stride_b + channel * tl.cast(stride_c, tl.int64)
        column = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(4):
            weight_y, inside_y = _tap(resize, y, first_y + i, True, SIZE)
            row = tl.zeros((BLOCK,), tl.int32)
            for j in tl.static_range(4):
                weight_x, inside_x = _tap(resize, x, first_x + j, valid, SIZE)
                at = tl.cast(first_y + i, tl.int64) * stride_y + (first_x + j).to(tl.int64) * stride_x
                level = tl.load(base + at, mask=inside_x & inside_y, other=0)
                row += level.to(tl.int32) * weight_x
            column += _level(row) * weight_y
        level = _level(column).to(tl.float32)
        value = tl.div_rn(tl.div_rn(level, 255.0) - tl.load(mean + channel), tl.load(std + channel))
        at = ((batch * TARGET + y) * TARGET + x) * 3 + channel
        tl.store(out + at, value.to(out.dtype.element_ty), mask=valid)
