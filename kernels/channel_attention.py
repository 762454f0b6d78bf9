"""Channel attention: within a group, every channel attends to every channel over all tokens."""

from __future__ import annotations

from torch import Tensor


def channel_attention_reference(qkv: Tensor, groups: int) -> Tensor:
    """Attention between the d channels of each group, with the N tokens as features.

    qkv: [B, N, 3C] packed projections. Returns [B, N, C]. Scores are scaled by N ** -0.5
    (Florence-2's DaViT; Ding et al. 2022, arXiv 2204.03645, section 3.3, scales by the width instead).
    """
    b, n, c3 = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, groups, c3 // 3 // groups).permute(2, 0, 3, 1, 4)  # [B, groups, N, d]
    # the scale goes to the small operand, before the sum over N, which keeps half precision in range
    scores = (q * n**-0.5).transpose(-1, -2) @ k  # [B, groups, d, d]
    out = v @ scores.softmax(-1).transpose(-1, -2)  # [B, groups, N, d]
    return out.transpose(1, 2).reshape(b, n, c3 // 3)


channel_attention = channel_attention_reference
