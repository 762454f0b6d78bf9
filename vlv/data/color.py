"""Convert images with an ICC profile to sRGB, through littleCMS."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}  # image mode -> the profile's colour space
_MAX_PROFILE = 16 << 20  # bytes; larger profiles are ignored


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of mode RGB, L, CMYK or LAB to RGB in sRGB, with relative colorimetric intent.

    Without a profile, with one that does not fit the mode or is damaged, and with one that is sRGB, this is Pillow's
    conversion to RGB, which leaves RGB pixels as they are.
    """
    if image.mode == "LAB":  # a colour space of its own, with or without a profile
        return ImageCms.applyTransform(image, _lab_transform())
    transform = _transform(profile, image.mode) if profile and len(profile) <= _MAX_PROFILE else None
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, None where nothing needs to be or can be converted."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return None if mode in ("RGB", "L") and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if a transform moves no colour of a 9 x 9 x 9 grid, or no grey, by more than one level."""
    steps = np.append(np.arange(0, 256, 32), 255).astype(np.uint8)
    if mode == "L":
        before = np.arange(256, dtype=np.uint8)[None]
        image, expected = Image.fromarray(before), np.stack([before] * 3, -1)
    else:
        expected = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3)
        image = Image.fromarray(expected)
    after = np.asarray(ImageCms.applyTransform(image, transform))
    return bool(np.abs(after.astype(int) - expected).max() <= 1)


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.createProfile("LAB"),
        ImageCms.createProfile("sRGB"),
        "LAB",
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
