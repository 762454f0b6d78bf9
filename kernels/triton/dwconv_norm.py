"""Depthwise 3x3 convolution, residual and LayerNorm: one program computes a few pixels with all their channels."""

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
def forward(
    x,
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
    TILE: tl.constexpr,
    FLIP: tl.constexpr,
    NORM: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """y = x + conv(x) + bias and normed = (y - mean) / sqrt(var + eps) * norm_weight + norm_bias: [B, H, W, C].

    FLIP turns the filter by 180 degrees, which gives the gradient of x. Grid: tiles of pixels, batch.
    """
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    base = x + tl.program_id(1).to(tl.int64) * stride_b
    o_p = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_y = _neighbour(base, o_p, 0, 0, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM)
    for tap in tl.static_range(9):
        b_w = tl.load(weight + o_c * 9 + (8 - tap if FLIP else tap), mask=m_c, other=0.0).to(SUM)
        dy, dx = tap // 3 - 1, tap % 3 - 1
        b_x = _neighbour(base, o_p, dy, dx, height, width, stride_h, stride_w, o_c, m_c, stride_c, SUM)
        b_y += b_x * b_w[None, :]
    if NORM:
        b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(SUM)[None, :]
    b_out = b_y.to(y.dtype.element_ty)
    o_y = (tl.program_id(1).to(tl.int64) * height * width + o_p)[:, None] * C + o_c[None, :]
    m_y = (o_p < height * width)[:, None] & m_c[None, :]
    tl.store(y + o_y, b_out, mask=m_y)
    if NORM:
        # of the rounded y, as a LayerNorm of the stored map would see it
        b_y = b_out.to(SUM)
        b_y = tl.where(m_c[None, :], b_y - (tl.sum(b_y, 1) / C)[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(b_y * b_y, 1) / C + eps)
        b_nw = tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(SUM)
        b_nb = tl.load(norm_bias + o_c, mask=m_c, other=0.0).to(SUM)
        b_n = b_y / deviation[:, None] * b_nw[None, :] + b_nb[None, :]
        tl.store(normed + o_y, b_n.to(normed.dtype.element_ty), mask=m_y)


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
