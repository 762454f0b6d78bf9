"""Depthwise 3x3 convolution, residual and LayerNorm of a channels-last map."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d, layer_norm


def dwconv_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The convolved map plus itself, and its LayerNorm: (y, norm(y)), each [B, H, W, C].

    x: [B, H, W, C]; weight: [C, 1, 3, 3]; the others [C]. The border is padded with zeros.
    """
    y = conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1) + x
    return y, layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)


dwconv_norm = dwconv_norm_reference
