"""Depthwise 3x3 convolution, residual and LayerNorm: one program computes a few pixels with all their channels."""

import triton
import triton.language as tl


@triton.jit
def _neighbour(x, pixels, dy, dx, height, width, stride_h, stride_w, c, used, stride_c, SUM: tl.constexpr):
    """Values [pixels, channels] at (row + dy, column + dx); zero beyond the map."""
    rows, columns = pixels // width + dy, pixels % width + dx
    inside = (pixels < height * width) & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    offsets = (rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w)[:, None]
    offsets += c.to(tl.int64)[None, :] * stride_c
    return tl.load(x + offsets, mask=inside[:, None] & used[None, :], other=0.0).to(SUM)


@triton.jit
def forward(
    x, weight, bias, norm_weight, norm_bias, y, normed, height, width, stride_b, stride_h, stride_w, stride_c, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr, FLIP: tl.constexpr, NORM: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """y [B, H, W, C] = x + conv(x), and LayerNorm(y). FLIP turns the filter round, which makes the gradient of x.

    Grid: tiles of pixels, batch.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    base = x + tl.program_id(1).to(tl.int64) * stride_b
    pixels = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.arange(0, BLOCK_C)
    used = c < C
    total = _neighbour(base, pixels, 0, 0, height, width, stride_h, stride_w, c, used, stride_c, SUM)
    for tap in tl.static_range(9):
        filter_tap = tl.load(weight + c * 9 + (8 - tap if FLIP else tap), mask=used, other=0.0).to(SUM)
        value = _neighbour(
            base, pixels, tap // 3 - 1, tap % 3 - 1, height, width, stride_h, stride_w, c, used, stride_c, SUM
        )  # fmt: skip
        total += value * filter_tap[None, :]
    if NORM:
        total += tl.load(bias + c, mask=used, other=0.0).to(SUM)[None, :]
    y_value = total.to(y.dtype.element_ty)
    at = (tl.program_id(1).to(tl.int64) * height * width + pixels)[:, None] * C + c[None, :]
    mask = (pixels < height * width)[:, None] & used[None, :]
    tl.store(y + at, y_value, mask=mask)
    if NORM:
        # of the rounded y, as a LayerNorm behind the stored map would see it
        total = y_value.to(SUM)
        centred = tl.where(used[None, :], total - (tl.sum(total, 1) / C)[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        scale = tl.load(norm_weight + c, mask=used, other=0.0).to(SUM)
        shift = tl.load(norm_bias + c, mask=used, other=0.0).to(SUM)
        result = centred / deviation[:, None] * scale[None, :] + shift[None, :]
        tl.store(normed + at, result.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    y, grad_y, grad_normed, norm_weight, grad_sum, part, pixels_total, chunk, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """grad_sum = grad_y + the LayerNorm's gradient; part [programs, 3, C]: norm weight, norm bias and bias.

    All maps are [pixels, C], contiguous. Grid: chunks of pixels.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    c = tl.arange(0, BLOCK_C)
    used = c < C
    scale = tl.load(norm_weight + c, mask=used, other=0.0).to(SUM)
    weight_sum = tl.zeros((BLOCK_C,), SUM)
    shift_sum = tl.zeros((BLOCK_C,), SUM)
    bias_sum = tl.zeros((BLOCK_C,), SUM)
    first = tl.program_id(0).to(tl.int64) * chunk
    for start in range(0, chunk, TILE):
        pixels = start + tl.arange(0, TILE)
        mask = ((pixels < chunk) & (first + pixels < pixels_total))[:, None] & used[None, :]
        at = (first + pixels)[:, None] * C + c[None, :]
        value = tl.load(y + at, mask=mask, other=0.0).to(SUM)
        grad = tl.load(grad_normed + at, mask=mask, other=0.0).to(SUM)
        centred = tl.where(used[None, :], value - (tl.sum(value, 1) / C)[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        unit = centred / deviation[:, None]
        scaled = grad * scale[None, :]
        inner = scaled - (tl.sum(scaled, 1) / C)[:, None] - unit * (tl.sum(scaled * unit, 1) / C)[:, None]
        total = tl.load(grad_y + at, mask=mask, other=0.0).to(SUM) + inner / deviation[:, None]
        total = tl.where(mask, total, 0.0)
        tl.store(grad_sum + at, total.to(grad_sum.dtype.element_ty), mask=mask)
        weight_sum += tl.sum(grad * unit, 0)
        shift_sum += tl.sum(grad, 0)
        bias_sum += tl.sum(total, 0)
    row = part + tl.program_id(0).to(tl.int64) * 3 * C + c
    tl.store(row, weight_sum, mask=used)
    tl.store(row + C, shift_sum, mask=used)
    tl.store(row + 2 * C, bias_sum, mask=used)


@triton.jit
def weight_backward(
    x, grad_sum, part, height, width, chunk, stride_b, stride_h, stride_w, stride_c,
    C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """part [B, chunks, C, 9]: the filter's gradient from each chunk of pixels. Grid: chunks, blocks of channels, B."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    batch = tl.program_id(2).to(tl.int64)
    base = x + batch * stride_b
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    used = c < C
    row = part + (batch * tl.num_programs(0) + tl.program_id(0)) * C * 9 + c * 9
    for tap in tl.static_range(9):
        total = tl.zeros((BLOCK_C,), SUM)
        for start in range(0, chunk, TILE):
            within = start + tl.arange(0, TILE)
            pixels = tl.program_id(0) * chunk + within
            mask = ((within < chunk) & (pixels < height * width))[:, None] & used[None, :]
            at = (batch * height * width + pixels)[:, None] * C + c[None, :]
            grad = tl.load(grad_sum + at, mask=mask, other=0.0).to(SUM)
            value = _neighbour(
                base, pixels, tap // 3 - 1, tap % 3 - 1, height, width, stride_h, stride_w, c, used, stride_c, SUM
            )  # fmt: skip
            total += tl.sum(grad * value, 0)
        tl.store(row + tap, total, mask=used)
