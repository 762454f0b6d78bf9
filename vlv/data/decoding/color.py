"""Convert images with an ICC profile to sRGB, through littleCMS."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # image mode -> the profile's colour space
_MAX_PROFILE = 16 << 20  # bytes; larger profiles are ignored
_SAME = 1  # levels that a transform may move a colour and still count as sRGB


def srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of an image of mode RGB, L or CMYK to sRGB in mode RGB, with relative colorimetric intent.

    Returns None where there is nothing to convert: no profile, one of another colour space than the image's, a
    damaged one, or one that is sRGB.
    """
    if not profile or len(profile) > _MAX_PROFILE or mode not in _SPACES:
        return None
    return _cached_transform(profile, mode)


@functools.lru_cache(maxsize=16)
def _cached_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = _to_srgb(source, mode)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _to_srgb(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    target = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if a transform moves no colour of a 9 x 9 x 9 grid, or no grey, by more than one level."""
    if mode == "L":
        before = np.arange(256, dtype=np.uint8)[None]
        expected = np.stack([before] * 3, -1)
    else:
        steps = np.append(np.arange(0, 256, 32), 255).astype(np.uint8)
        before = expected = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3)
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(before), transform))
    return bool(np.abs(after.astype(int) - expected).max() <= _SAME)


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of mode LAB to RGB in sRGB."""
    return ImageCms.applyTransform(image, _lab_transform())


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return _to_srgb(ImageCms.createProfile("LAB"), "LAB")
