"""Depthwise 3x3 convolution, residual and LayerNorm: one program computes pixels with all their channels.

Designs of `forward`:

    0 pixels     a program computes TILE neighbouring pixels; it loads ten values and nine weights for each channel
    1 columns    a program walks down TILE columns for LINES rows: the weights stay in registers, and each loaded row
                 adds to the three rows around it, so that an element is loaded three times, twice of them from L1
    2 rows       the same along TILE rows, for LINES columns
"""

import triton
import triton.language as tl


@triton.jit
def _neighbour(x, o_p, dy, dx, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM: tl.constexpr):
    """Return x at (row + dy, column + dx) of the pixels o_p: [pixels, channels], zero beyond the map."""
    rows, columns = o_p // width + dy, o_p % width + dx
    m_p = (o_p < height * width) & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    o_x = (rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w)[:, None]
    o_x += o_c.to(tl.int64)[None, :] * stride_c
    return tl.load(x + o_x, mask=m_p[:, None] & m_c[None, :], other=0.0).to(SUM)


@triton.jit
def _store(
    b_y,
    y,
    normed,
    norm_weight,
    norm_bias,
    o_p,
    m_p,
    o_c,
    m_c,
    eps,
    C: tl.constexpr,
    NORM: tl.constexpr,
    SUM: tl.constexpr,
):
    """Store y of the pixels o_p, and its LayerNorm over the channels."""
    o_y = o_p[:, None] * C + o_c[None, :]
    m_y = m_p[:, None] & m_c[None, :]
    b_out = b_y.to(y.dtype.element_ty)
    tl.store(y + o_y, b_out, mask=m_y)
    if NORM:
        # of the rounded y, as a LayerNorm of the stored map would see it
        b_y = b_out.to(SUM)
        b_y = tl.where(m_c[None, :], b_y - (tl.sum(b_y, 1) / C)[:, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(b_y * b_y, 1) / C + eps)
        b_nw = tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(SUM)
        b_nb = tl.load(norm_bias + o_c, mask=m_c, other=0.0).to(SUM)
        b_n = b_y * scale[:, None] * b_nw[None, :] + b_nb[None, :]
        tl.store(normed + o_y, b_n.to(normed.dtype.element_ty), mask=m_y)


@triton.jit
def _line(x, residual, o_x, i, j, size_i, size_j, stride_i, m_c, RESIDUAL: tl.constexpr):
    """Load line i of x and residual at the columns j (offsets o_x): [TILE, channels] each, zero beyond the map."""
    o_i = tl.zeros_like(j) + i
    m_x = ((o_i >= 0) & (o_i < size_i) & (j >= 0) & (j < size_j))[:, None] & m_c[None, :]
    o_x = o_x + o_i.to(tl.int64)[:, None] * stride_i
    b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    b_r = b_x
    if RESIDUAL:
        b_r = tl.load(residual + o_x, mask=m_x, other=0.0)
    return b_x, b_r


@triton.jit
def _sum(b_x, b_r, RESIDUAL: tl.constexpr, SUM: tl.constexpr):
    """Return x + residual rounded to their dtype, as an addition before the operation would store it."""
    if RESIDUAL:
        b_x = (b_x.to(SUM) + b_r.to(SUM)).to(b_x.dtype)
    return b_x.to(SUM)


@triton.jit
def _taps(weight, o_c, m_c, side, FLIP: tl.constexpr, DOWN: tl.constexpr, SUM: tl.constexpr):
    """Load the three taps [channels] of the filter's line `side` (0, 1, 2) across the direction of the walk."""
    first = side * 3 if DOWN else side
    step = 3 - 2 * DOWN
    if FLIP:
        first = 8 - first
        step = -step
    p_w = weight + o_c * 9 + first
    b_w0 = tl.load(p_w, mask=m_c, other=0.0).to(SUM)
    b_w1 = tl.load(p_w + step, mask=m_c, other=0.0).to(SUM)
    return b_w0, b_w1, tl.load(p_w + 2 * step, mask=m_c, other=0.0).to(SUM)


@triton.jit
def _weighted(taps, b_left, b_centre, b_right):
    b_w0, b_w1, b_w2 = taps
    return b_left * b_w0[None, :] + b_centre * b_w1[None, :] + b_right * b_w2[None, :]


@triton.jit
def forward(
    x,
    residual,
    weight,
    bias,
    norm_weight,
    norm_bias,
    y,
    normed,
    height,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLIP: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DOUBLE: tl.constexpr,
    DESIGN: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
):
    """y = x + conv(x) + bias and normed = (y - mean) / sqrt(var + eps) * norm_weight + norm_bias: [B, H, W, C].

    With RESIDUAL, x + residual (of equal strides) replaces x. FLIP turns the filter by 180 degrees, which gives the
    gradient of x. Grid of design 0: tiles of pixels, 1, batch; of 1 and 2: tiles across the walk, runs of LINES lines,
    batch.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    DOWN: tl.constexpr = DESIGN == 1
    i_b = tl.program_id(2).to(tl.int64)
    base, base_r = x + i_b * stride_b, residual + i_b * stride_b
    o_image = i_b * height * width
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_b = tl.zeros((BLOCK_C,), SUM)
    if NORM:
        b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(SUM)
    if DESIGN == 0:
        o_p = tl.program_id(0) * TILE + tl.arange(0, TILE)
        b_y = _neighbour(base, o_p, 0, 0, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM)
        if RESIDUAL:
            b_y = (
                (b_y + _neighbour(base_r, o_p, 0, 0, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM))
                .to(x.dtype.element_ty)
                .to(SUM)
            )
        for tap in tl.static_range(9):
            b_w = tl.load(weight + o_c * 9 + (8 - tap if FLIP else tap), mask=m_c, other=0.0).to(SUM)
            b_x = _neighbour(
                base, o_p, tap // 3 - 1, tap % 3 - 1, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM
            )
            if RESIDUAL:
                b_r = _neighbour(
                    base_r, o_p, tap // 3 - 1, tap % 3 - 1, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM
                )
                b_x = (b_x + b_r).to(x.dtype.element_ty).to(SUM)
            b_y += b_x * b_w[None, :]
        b_y += b_b[None, :]
        m_p = o_p < height * width
        _store(b_y, y, normed, norm_weight, norm_bias, o_image + o_p, m_p, o_c, m_c, eps, C, NORM, SUM)
    else:
        size_i, size_j = (height, width) if DOWN else (width, height)
        stride_i, stride_j = (stride_h, stride_w) if DOWN else (stride_w, stride_h)
        taps0 = _taps(weight, o_c, m_c, 0, FLIP, DOWN, SUM)
        taps1 = _taps(weight, o_c, m_c, 1, FLIP, DOWN, SUM)
        taps2 = _taps(weight, o_c, m_c, 2, FLIP, DOWN, SUM)
        j = tl.program_id(0) * TILE + tl.arange(0, TILE)
        o_l = (j - 1).to(tl.int64)[:, None] * stride_j + o_c.to(tl.int64)[None, :] * stride_c
        o_m = j.to(tl.int64)[:, None] * stride_j + o_c.to(tl.int64)[None, :] * stride_c
        o_r = (j + 1).to(tl.int64)[:, None] * stride_j + o_c.to(tl.int64)[None, :] * stride_c
        first = tl.program_id(1) * LINES
        last = tl.minimum(first + LINES, size_i)
        # b_next: the first taps of the line after the loaded one; b_done: a line that lacks its last taps
        b_next = tl.zeros((TILE, BLOCK_C), SUM)
        b_done = tl.zeros((TILE, BLOCK_C), SUM)
        for line in tl.static_range(2):
            i = first - 1 + line
            x_l, r_l = _line(base, base_r, o_l, i, j - 1, size_i, size_j, stride_i, m_c, RESIDUAL)
            x_m, r_m = _line(base, base_r, o_m, i, j, size_i, size_j, stride_i, m_c, RESIDUAL)
            x_r, r_r = _line(base, base_r, o_r, i, j + 1, size_i, size_j, stride_i, m_c, RESIDUAL)
            b_l, b_m, b_r = _sum(x_l, r_l, RESIDUAL, SUM), _sum(x_m, r_m, RESIDUAL, SUM), _sum(x_r, r_r, RESIDUAL, SUM)
            b_done = b_next + b_m + _weighted(taps1, b_l, b_m, b_r)
            b_next = b_b[None, :] + _weighted(taps0, b_l, b_m, b_r)
        i = first + 1
        x_l, r_l = _line(base, base_r, o_l, i, j - 1, size_i, size_j, stride_i, m_c, RESIDUAL)
        x_m, r_m = _line(base, base_r, o_m, i, j, size_i, size_j, stride_i, m_c, RESIDUAL)
        x_r, r_r = _line(base, base_r, o_r, i, j + 1, size_i, size_j, stride_i, m_c, RESIDUAL)
        for line in range(first, last):
            b_l, b_m, b_r = _sum(x_l, r_l, RESIDUAL, SUM), _sum(x_m, r_m, RESIDUAL, SUM), _sum(x_r, r_r, RESIDUAL, SUM)
            # the line after the next, loaded while this one is computed
            i = line + 2
            x_l, r_l = _line(base, base_r, o_l, i, j - 1, size_i, size_j, stride_i, m_c, RESIDUAL)
            x_m, r_m = _line(base, base_r, o_m, i, j, size_i, size_j, stride_i, m_c, RESIDUAL)
            x_r, r_r = _line(base, base_r, o_r, i, j + 1, size_i, size_j, stride_i, m_c, RESIDUAL)
            b_y = b_done + _weighted(taps2, b_l, b_m, b_r)
            o_p = line * width + j if DOWN else j * width + line
            _store(b_y, y, normed, norm_weight, norm_bias, o_image + o_p, j < size_j, o_c, m_c, eps, C, NORM, SUM)
            b_done = b_next + b_m + _weighted(taps1, b_l, b_m, b_r)
            b_next = b_b[None, :] + _weighted(taps0, b_l, b_m, b_r)


@triton.jit
def norm_backward(
    y,
    grad_y,
    grad_normed,
    norm_weight,
    grad_sum,
    part,
    pixels,
    chunk,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """grad_sum = grad_y + the LayerNorm's gradient; part [programs, 3, C]: norm weight, norm bias and bias.

    With u = (y - mean) / deviation and g = grad_normed * norm_weight, the LayerNorm's gradient is
    (g - mean(g) - u mean(g u)) / deviation. All maps are [pixels, C], contiguous. Grid: chunks of pixels.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_nw = tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(SUM)
    norm_weight_sum = tl.zeros((BLOCK_C,), SUM)
    norm_bias_sum = tl.zeros((BLOCK_C,), SUM)
    bias_sum = tl.zeros((BLOCK_C,), SUM)
    first = tl.program_id(0).to(tl.int64) * chunk
    for start in range(0, chunk, TILE):
        o_p = start + tl.arange(0, TILE)
        mask = ((o_p < chunk) & (first + o_p < pixels))[:, None] & m_c[None, :]
        o_pc = (first + o_p)[:, None] * C + o_c[None, :]
        b_y = tl.load(y + o_pc, mask=mask, other=0.0).to(SUM)
        b_dn = tl.load(grad_normed + o_pc, mask=mask, other=0.0).to(SUM)
        b_y = tl.where(m_c[None, :], b_y - (tl.sum(b_y, 1) / C)[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(b_y * b_y, 1) / C + eps)
        b_u = b_y / deviation[:, None]
        b_g = b_dn * b_nw[None, :]
        b_g = b_g - (tl.sum(b_g, 1) / C)[:, None] - b_u * (tl.sum(b_g * b_u, 1) / C)[:, None]
        b_sum = tl.load(grad_y + o_pc, mask=mask, other=0.0).to(SUM) + b_g / deviation[:, None]
        b_sum = tl.where(mask, b_sum, 0.0)
        tl.store(grad_sum + o_pc, b_sum.to(grad_sum.dtype.element_ty), mask=mask)
        norm_weight_sum += tl.sum(b_dn * b_u, 0)
        norm_bias_sum += tl.sum(b_dn, 0)
        bias_sum += tl.sum(b_sum, 0)
    p_part = part + tl.program_id(0).to(tl.int64) * 3 * C + o_c
    tl.store(p_part, norm_weight_sum, mask=m_c)
    tl.store(p_part + C, norm_bias_sum, mask=m_c)
    tl.store(p_part + 2 * C, bias_sum, mask=m_c)


@triton.jit
def weight_backward(
    x,
    grad_sum,
    part,
    height,
    width,
    chunk,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """part [B, chunks, C, 9]: sum over a chunk's pixels of grad_sum times x at the tap's neighbour.

    Grid: chunks, blocks of channels, batch.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    i_b = tl.program_id(2).to(tl.int64)
    base = x + i_b * stride_b
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_part = part + (i_b * tl.num_programs(0) + tl.program_id(0)) * C * 9 + o_c * 9
    for tap in tl.static_range(9):
        b_sum = tl.zeros((BLOCK_C,), SUM)
        for start in range(0, chunk, TILE):
            within = start + tl.arange(0, TILE)
            o_p = tl.program_id(0) * chunk + within
            mask = ((within < chunk) & (o_p < height * width))[:, None] & m_c[None, :]
            o_pc = (i_b * height * width + o_p)[:, None] * C + o_c[None, :]
            b_g = tl.load(grad_sum + o_pc, mask=mask, other=0.0).to(SUM)
            dy, dx = tap // 3 - 1, tap % 3 - 1
            b_x = _neighbour(base, o_p, dy, dx, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM)
            b_sum += tl.sum(b_g * b_x, 0)
        tl.store(p_part + tap, b_sum, mask=m_c)
