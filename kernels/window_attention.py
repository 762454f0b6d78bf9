"""Window attention that reads its windows straight from the QKV map."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def window_attention_reference(qkv: Tensor, bias: Tensor, heads: int, window: int) -> Tensor:
    """Multi-head self-attention within non-overlapping windows.

    qkv: [B, H, W, 3C], the packed projections of the map's tokens, `bias` included; bias: [3C].
    Returns [B, H, W, C]. A map that is no multiple of the window is padded at the bottom and right
    with tokens of value zero *before* the projection, so their QKV is the bias, and they take part
    in the softmax (Florence-2, modeling_florence2.py: WindowAttention).
    """
    b, h, w, c3 = qkv.shape
    rows, columns = -(-h // window), -(-w // window)
    if (rows * window, columns * window) != (h, w):
        padded = bias.to(qkv.dtype).expand(b, rows * window, columns * window, c3).clone()
        padded[:, :h, :w] = qkv
        qkv = padded
    # [B, rows, window, columns, window, 3, heads, d] -> [3, B * rows * columns, heads, window², d]
    split = qkv.reshape(b, rows, window, columns, window, 3, heads, c3 // 3 // heads)
    q, k, v = split.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, b * rows * columns, heads, window * window, -1)
    out = scaled_dot_product_attention(q, k, v)
    out = out.reshape(b, rows, columns, heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(b, rows * window, columns * window, c3 // 3)[:, :h, :w]


window_attention = window_attention_reference
