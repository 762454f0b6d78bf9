"""Bicubic upsampling and normalisation of 8-bit pictures, equal to Pillow's and the published processor's."""

from __future__ import annotations

import torch
from torch import Tensor


def bicubic_matrix(size: int, target: int) -> Tensor:
    """The matrix [target, size] of Pillow's bicubic resampling along one axis (a = -0.5), float32.

    Source: Pillow's src/libImaging/Resample.c; taps beyond the border are dropped and the rest rescaled.
    """
    scale = size / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    distance = ((torch.arange(size, dtype=torch.float64) + 0.5)[None] - centre[:, None]).abs() / stretch
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return (taps / taps.sum(1, keepdim=True)).float()


def upsample_normalize_reference(pixels: Tensor, resize: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] RGB -> float32 [B, T, T, 3], channels last.

    resize: float32 [T, S] from `bicubic_matrix`; mean, std: float32 [3]. Both passes round to 8 bits, as
    Pillow does, so the result is the published processor's. Pillow rounds halves up, and at 2x one value
    in 128 is a half.
    """
    wide = (pixels.to(resize.dtype) @ resize.T).add_(0.5).floor_().clamp_(0, 255)  # horizontal pass first
    full = (resize @ wide).add_(0.5).floor_().clamp_(0, 255).permute(0, 2, 3, 1)
    return (full / 255 - mean) / std


upsample_normalize = upsample_normalize_reference
