"""GroupNorm in two passes: mean and squared deviation of each chunk of a group, then the norm of the map.

An element of a group is numbered with its pixel inside its channel, or, for a channels-last map (INNER), with its
channel inside its pixel, which is the order in memory.
"""

import triton
import triton.language as tl


@triton.jit
def _elements(o_e, pixels, stride_c, stride_p, PER_GROUP: tl.constexpr, INNER: tl.constexpr):
    """Return the offsets (int64) of a group's elements within it, and their channels within it."""
    if INNER:
        channel, pixel = o_e % PER_GROUP, o_e // PER_GROUP
    else:
        channel, pixel = o_e // pixels, o_e % pixels
    return channel.to(tl.int64) * stride_c + pixel.to(tl.int64) * stride_p, channel


@triton.jit
def statistics(
    x,
    part,
    pixels,
    chunk,
    stride_b,
    stride_c,
    stride_p,
    PER_GROUP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """part [B, groups, splits, 2] = mean and sum (x - mean)^2 of each chunk. Grid: splits, groups, batch."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    base = x + tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * PER_GROUP * stride_c
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, pixels * PER_GROUP)
    o_e = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), SUM)
    for start in range(first, last, BLOCK):
        o_x, _ = _elements(start + o_e, pixels, stride_c, stride_p, PER_GROUP, INNER)
        b_sum += tl.load(base + o_x, mask=start + o_e < last, other=0.0).to(SUM)
    mean = tl.sum(b_sum, 0) / (last - first)
    # a second read, of memory still in the cache, keeps the digits that a difference of squares would lose
    b_square = tl.zeros((BLOCK,), SUM)
    for start in range(first, last, BLOCK):
        o_x, _ = _elements(start + o_e, pixels, stride_c, stride_p, PER_GROUP, INNER)
        b_x = tl.load(base + o_x, mask=start + o_e < last, other=0.0).to(SUM)
        b_x = tl.where(start + o_e < last, b_x - mean, 0.0)
        b_square += b_x * b_x
    o_part = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    p_part = part + (o_part + tl.program_id(0)) * 2
    tl.store(p_part, mean)
    tl.store(p_part + 1, tl.sum(b_square, 0))


@triton.jit
def apply(
    x,
    weight,
    bias,
    part,
    out,
    pixels,
    chunk,
    splits,
    stride_b,
    stride_c,
    stride_p,
    eps,
    PER_GROUP: tl.constexpr,
    INNER: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """out = silu(n) with n = (x - mean) / sqrt(var + eps) * weight + bias, and silu(n) = n / (1 + e^-n) if SILU.

    out has x's strides. Grid: splits, groups, batch.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    i_b, i_g = tl.program_id(2).to(tl.int64), tl.program_id(1)
    count = pixels * PER_GROUP
    p_part = part + (i_b * tl.num_programs(1) + i_g) * splits * 2
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    b_size = tl.maximum(tl.minimum(chunk, count - o_s * chunk), 0).to(SUM)  # elements in each chunk
    b_size = tl.where(m_s, b_size, 0.0)
    b_mean = tl.load(p_part + o_s * 2, mask=m_s, other=0.0)
    b_square = tl.load(p_part + o_s * 2 + 1, mask=m_s, other=0.0)
    mean = tl.sum(b_mean * b_size, 0) / count
    b_mean = b_mean - mean
    variance = (tl.sum(b_square, 0) + tl.sum(b_mean * b_mean * b_size, 0)) / count
    scale = 1 / tl.sqrt(variance + eps)

    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, count)
    o_group = i_b * stride_b + i_g.to(tl.int64) * PER_GROUP * stride_c
    o_e = tl.arange(0, BLOCK)
    for start in range(first, last, BLOCK):
        m_e = start + o_e < last
        o_x, channel = _elements(start + o_e, pixels, stride_c, stride_p, PER_GROUP, INNER)
        b_x = tl.load(x + o_group + o_x, mask=m_e, other=0.0).to(SUM)
        b_w = tl.load(weight + i_g * PER_GROUP + channel, mask=m_e, other=0.0).to(SUM)
        b_b = tl.load(bias + i_g * PER_GROUP + channel, mask=m_e, other=0.0).to(SUM)
        b_x = (b_x - mean) * scale * b_w + b_b
        if SILU:
            b_x = b_x / (1 + tl.exp2(-1.4426950408889634 * b_x))
        tl.store(out + o_group + o_x, b_x.to(out.dtype.element_ty), mask=m_e)
