"""Bicubic upsampling of grey levels in integers, as Pillow computes it, and their normalisation."""

import triton
import triton.language as tl


@triton.jit
def _tap(resize, target, source, m_p, stride, SIZE: tl.constexpr):
    """Return the filter's 22-bit weight of `source` at `target` (0 beyond the border), its mask and its offset."""
    inside = m_p & (source >= 0) & (source < SIZE)
    b_w = tl.load(resize + target * SIZE + source, mask=inside, other=0.0)
    return (b_w * 4194304.0).to(tl.int32), inside, tl.cast(source, tl.int64) * stride


@triton.jit
def _taps(resize, target, m_p, stride, SIZE: tl.constexpr, TARGET: tl.constexpr):
    """Return the four taps of the bicubic filter around `target` along one axis.

    The first is floor((target + 0.5) * SIZE / TARGET - 2.5) + 1, in integers that stay positive.
    """
    first = ((2 * target + 1) * SIZE + TARGET) // (2 * TARGET) - 2
    return (
        _tap(resize, target, first, m_p, stride, SIZE),
        _tap(resize, target, first + 1, m_p, stride, SIZE),
        _tap(resize, target, first + 2, m_p, stride, SIZE),
        _tap(resize, target, first + 3, m_p, stride, SIZE),
    )


@triton.jit
def _level(b_sum):
    """Round a sum of 22-bit taps to a grey level, as Pillow does."""
    return tl.minimum(tl.maximum((b_sum + 2097152) >> 22, 0), 255)


@triton.jit
def forward(
    pixels,
    resize,
    mean,
    std,
    out,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    SIZE: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (level(sum_i w_i level(sum_j w_j pixels[i, j])) / 255 - mean) / std, with w the bicubic weights.

    pixels [B, 3, SIZE, SIZE] strided -> out [B, TARGET, TARGET, 3] contiguous. The pixels are grey levels: uint8, or
    float16 from TensorRT. Grid: pixel tiles, batch.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < TARGET * TARGET
    y, x = o_p // TARGET, o_p % TARGET
    taps_y, taps_x = _taps(resize, y, m_p, stride_y, SIZE, TARGET), _taps(resize, x, m_p, stride_x, SIZE, TARGET)
    for channel in tl.static_range(3):
        base = pixels + i_b * stride_b + channel * tl.cast(stride_c, tl.int64)
        b_column = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(4):
            weight_y, inside_y, o_y = taps_y[i]
            b_row = tl.zeros((BLOCK,), tl.int32)
            for j in tl.static_range(4):
                weight_x, inside_x, o_x = taps_x[j]
                b_x = tl.load(base + o_y + o_x, mask=inside_x & inside_y, other=0)
                b_row += b_x.to(tl.int32) * weight_x
            b_column += _level(b_row) * weight_y
        b_level = _level(b_column).to(tl.float32)
        b_out = tl.div_rn(tl.div_rn(b_level, 255.0) - tl.load(mean + channel), tl.load(std + channel))
        p_out = out + (i_b * TARGET * TARGET + o_p) * 3 + channel
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_p)
