"""Bicubic upsampling of grey levels in whole numbers, as Pillow computes it, and their normalisation."""

import triton
import triton.language as tl


@triton.jit
def _first_tap(target, SIZE: tl.constexpr, TARGET: tl.constexpr):
    """The first of the four source places under the bicubic filter around `target` (may lie before the border)."""
    # floor((target + 0.5) * SIZE / TARGET - 2.5) + 1, in whole numbers that stay positive
    return ((2 * target + 1) * SIZE + TARGET) // (2 * TARGET) - 2


@triton.jit
def _tap(resize, target, source, valid, stride, SIZE: tl.constexpr):
    """The filter's weight of `source` at `target`, as Pillow's 22-bit whole number, zero beyond the border; whether it
    is within; and its offset."""
    inside = valid & (source >= 0) & (source < SIZE)
    weight = tl.load(resize + target * SIZE + source, mask=inside, other=0.0)
    return (weight * 4194304.0).to(tl.int32), inside, tl.cast(source, tl.int64) * stride


@triton.jit
def _taps(resize, target, valid, stride, SIZE: tl.constexpr, TARGET: tl.constexpr):
    """The four taps around `target` along one axis."""
    first = _first_tap(target, SIZE, TARGET)
    return (
        _tap(resize, target, first, valid, stride, SIZE), _tap(resize, target, first + 1, valid, stride, SIZE),
        _tap(resize, target, first + 2, valid, stride, SIZE), _tap(resize, target, first + 3, valid, stride, SIZE),
    )  # fmt: skip


@triton.jit
def _level(total):
    """Pillow's rounding of a sum of 22-bit taps to a grey level."""
    return tl.minimum(tl.maximum((total + 2097152) >> 22, 0), 255)


@triton.jit
def forward(
    pixels, resize, mean, std, out, stride_b, stride_c, stride_y, stride_x,
    SIZE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pixels [B, 3, SIZE, SIZE] strided -> out [B, TARGET, TARGET, 3] contiguous. Grid: pixel tiles, batch.

    The pixels are grey levels: uint8, or float16 from TensorRT.
    """
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < TARGET * TARGET
    y, x = pixel // TARGET, pixel % TARGET
    taps_y, taps_x = _taps(resize, y, valid, stride_y, SIZE, TARGET), _taps(resize, x, valid, stride_x, SIZE, TARGET)
    for channel in tl.static_range(3):
        base = pixels + batch * stride_b + channel * tl.cast(stride_c, tl.int64)
        column = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(4):
            weight_y, inside_y, at_y = taps_y[i]
            row = tl.zeros((BLOCK,), tl.int32)
            for j in tl.static_range(4):
                weight_x, inside_x, at_x = taps_x[j]
                level = tl.load(base + at_y + at_x, mask=inside_x & inside_y, other=0)
                row += level.to(tl.int32) * weight_x
            column += _level(row) * weight_y
        level = _level(column).to(tl.float32)
        value = tl.div_rn(tl.div_rn(level, 255.0) - tl.load(mean + channel), tl.load(std + channel))
        at = (batch * TARGET * TARGET + pixel) * 3 + channel
        tl.store(out + at, value.to(out.dtype.element_ty), mask=valid)
