"""GroupNorm in two passes: mean and squared deviation of each chunk of a group, then the map from all of them.

An element of a group is numbered with its pixel inside its channel, or, for a channels-last map (INNER), with its
channel inside its pixel, which is the order in memory.
"""

import triton
import triton.language as tl


@triton.jit
def _places(e, pixels, stride_c, stride_p, PER_GROUP: tl.constexpr, INNER: tl.constexpr):
    """Offsets (int64) of a group's elements within it, and their channels within it."""
    if INNER:
        channel, pixel = e % PER_GROUP, e // PER_GROUP
    else:
        channel, pixel = e // pixels, e % pixels
    return channel.to(tl.int64) * stride_c + pixel.to(tl.int64) * stride_p, channel


@triton.jit
def statistics(
    x, part, pixels, chunk, stride_b, stride_c, stride_p,
    PER_GROUP: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """part [B, groups, splits, 2]: mean and summed squared deviation of each chunk. Grid: splits, groups, batch."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    base = x + tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * PER_GROUP * stride_c
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, pixels * PER_GROUP)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), SUM)
    for start in range(first, last, BLOCK):
        at, _ = _places(start + lanes, pixels, stride_c, stride_p, PER_GROUP, INNER)
        total += tl.load(base + at, mask=start + lanes < last, other=0.0).to(SUM)
    mean = tl.sum(total, 0) / (last - first)
    # a second look, at memory still in the cache, keeps the digits that a difference of squares would lose
    square = tl.zeros((BLOCK,), SUM)
    for start in range(first, last, BLOCK):
        at, _ = _places(start + lanes, pixels, stride_c, stride_p, PER_GROUP, INNER)
        value = tl.load(base + at, mask=start + lanes < last, other=0.0).to(SUM)
        centred = tl.where(start + lanes < last, value - mean, 0.0)
        square += centred * centred
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    row = part + (row + tl.program_id(0)) * 2
    tl.store(row, mean)
    tl.store(row + 1, tl.sum(square, 0))


@triton.jit
def apply(
    x, weight, bias, part, out, pixels, chunk, splits, stride_b, stride_c, stride_p, eps,
    PER_GROUP: tl.constexpr, INNER: tl.constexpr, SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """out, with x's strides, = silu(norm(x)). Grid: splits, groups, batch."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    batch, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    count = pixels * PER_GROUP
    row = part + (batch * tl.num_programs(1) + group) * splits * 2
    split = tl.arange(0, BLOCK_S)
    size = tl.maximum(tl.minimum(chunk, count - split * chunk), 0).to(SUM)  # elements in each chunk
    means = tl.load(row + split * 2, mask=split < splits, other=0.0)
    squares = tl.load(row + split * 2 + 1, mask=split < splits, other=0.0)
    size = tl.where(split < splits, size, 0.0)
    mean = tl.sum(means * size, 0) / count
    off = means - mean
    variance = (tl.sum(squares, 0) + tl.sum(off * off * size, 0)) / count
    scale = 1 / tl.sqrt(variance + eps)

    offset = batch * stride_b + group.to(tl.int64) * PER_GROUP * stride_c
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, count)
    lanes = tl.arange(0, BLOCK)
    for start in range(first, last, BLOCK):
        mask = start + lanes < last
        at, channel = _places(start + lanes, pixels, stride_c, stride_p, PER_GROUP, INNER)
        value = tl.load(x + offset + at, mask=mask, other=0.0).to(SUM)
        w = tl.load(weight + group * PER_GROUP + channel, mask=mask, other=0.0).to(SUM)
        b = tl.load(bias + group * PER_GROUP + channel, mask=mask, other=0.0).to(SUM)
        value = (value - mean) * scale * w + b
        if SILU:
            value = value / (1 + tl.exp2(-1.4426950408889634 * value))
        tl.store(out + offset + at, value.to(out.dtype.element_ty), mask=mask)
