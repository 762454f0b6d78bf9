"""Bicubic upsampling and normalisation of 8-bit images, equal to Pillow's and the published processor's."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, strides


def bicubic_matrix(size: int, target: int) -> Tensor:
    """Return the matrix [target, size] of Pillow's bicubic resampling along one axis (a = -0.5), float32.

    Source: Pillow's src/libImaging/Resample.c; taps beyond the border are dropped, the rest rescaled and
    rounded to 22 bits.
    """
    scale = size / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    distance = ((torch.arange(size, dtype=torch.float64) + 0.5)[None] - centre[:, None]).abs() / stretch
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return (taps / taps.sum(1, keepdim=True) * 2**22).round().div(2**22).float()


def _resample(x: Tensor, taps: Tensor) -> Tensor:
    """Resample along the last axis as Pillow does: grey levels [..., S] -> rounded, clipped grey levels [..., T].

    Pillow sums 22-bit taps in integers and rounds halves up; at 2x one sum in 128 is a half or close to one. Taps
    split into multiples of 2**-11 and the rest make every float32 sum here exact, so the levels are Pillow's.
    """
    coarse = (taps * 2**11).round() / 2**11
    row_sum = (x @ coarse.T).add_(0.5)
    level = row_sum.floor()
    # in place: on a CPU, passes over memory dominate the cost
    return row_sum.sub_(level).add_(x @ (taps - coarse).T).floor_().add_(level).clamp_(0, 255)


def upsample_normalize_reference(
    pixels: Tensor, resize: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Upsample and normalise uint8 [B, 3, S, S] RGB, or integers in a float dtype, to [B, T, T, 3] in `dtype`.

    resize: float32 [T, S] from `bicubic_matrix`; mean, std: float32 [3]. Both passes round to 8 bits, as
    Pillow does, so the result is the published processor's.
    """
    wide = _resample(pixels.to(resize.dtype), resize)  # [B, 3, S, T], the horizontal pass first
    full = _resample(wide.transpose(-1, -2), resize)  # [B, 3, T columns, T rows]
    return (full.permute(0, 3, 2, 1) / 255).sub_(mean).div_(std).to(dtype)


def upsample_normalize(
    pixels: Tensor, resize: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute `upsample_normalize_reference`, fused on CUDA where T >= S: equal levels, only the result is written."""
    target, size = resize.shape
    fits = resize.dtype == torch.float32 and size <= target < 2**14
    if fused("upsample_normalize", resize, pixels, mean, std, fits=fits):
        return upsample_normalize_op(pixels, resize, mean, std, dtype)
    return upsample_normalize_reference(pixels, resize, mean, std, dtype)


def _launch(pixels: Tensor, resize: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> None:
    target, size = resize.shape
    args = {"pixels": pixels, "resize": resize.contiguous(), "mean": mean, "std": std, "out": out}
    launch(
        "upsample_normalize.forward",
        f"t{target}",
        lambda meta: (cdiv(target * target, meta["BLOCK"]), len(pixels)),
        {**args, **strides("stride", pixels, "bcyx")},
        {"SIZE": size, "TARGET": target},
    )


@torch.library.custom_op("vlv::upsample_normalize", mutates_args=())
def upsample_normalize_op(pixels: Tensor, resize: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [B, T, T, 3]."""
    out = _fake(pixels, resize, mean, std, dtype)
    _launch(pixels, resize, mean, std, out)
    return out


@upsample_normalize_op.register_fake
def _fake(pixels: Tensor, resize: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    target = resize.shape[0]
    return pixels.new_empty(pixels.shape[0], target, target, 3, dtype=dtype)  # len() would fix an export's batch
