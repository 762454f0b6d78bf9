"""The pixels of valid files in many layouts are those that an independent decoder shows."""

from __future__ import annotations

import importlib.util
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.vlv.data import pixel_cases
from vlv.data.image import load_crop

FILES = dict(pixel_cases.cases())
EXPECTED = json.loads(pixel_cases.EXPECTED.read_text())
SIDE = pixel_cases.SIDE


def expected(name: str) -> np.ndarray:
    pixels = np.frombuffer(zlib.decompress(bytes.fromhex(EXPECTED[name]["pixels"])), np.uint8)
    side = int((len(pixels) / 3) ** 0.5)
    return pixels.reshape(side, side, 3).transpose(2, 0, 1)


def difference(name: str, pixels: np.ndarray) -> int:
    return int(np.abs(load_crop(FILES[name], pixels.shape[-1]).astype(int) - pixels).max())


def tolerance(name: str) -> int:
    """Levels: one for another rounding; three where a profile is applied to 8 or to 16 bits, or JPEG is decoded."""
    return 3 if any(word in name for word in ("wide", "swapped", "profile", "jpeg", "premultiplied")) else 1


def test_there_are_enough_files_and_each_has_its_expected_pixels():
    assert len(FILES) >= 60 and FILES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", FILES)
def test_pixels(name):
    assert difference(name, expected(name)) <= tolerance(name)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pyvips", "tifffile"))), reason="needs pyvips-binary, pyvips, tifffile"
)
def test_pixels_with_the_decoders_here():
    found = {name: pixel_cases.reference(name, content)[1].transpose(2, 0, 1) for name, content in FILES.items()}
    wrong = [name for name, pixels in found.items() if difference(name, pixels) > tolerance(name)]
    assert not wrong


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
def test_untagged_and_srgb_images_are_what_pillow_makes_of_them(mode):
    """Byte by byte the published preprocessing, with or without sRGB's own profile."""
    image = Image.fromarray(pixel_cases.levels(3, 8).astype(np.uint8)).convert(mode)
    color = image.convert("RGBA") if mode in ("RGBA", "LA") else image
    plain = np.asarray(color.convert("RGB").resize((9, 9), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for options in ({}, {"icc_profile": srgb}):
        assert np.array_equal(load_crop(pixel_cases.pillow(image, "PNG", **options), 9), plain), options


@pytest.mark.parametrize("name", [name for name in FILES if "wide" in name or "profile" in name])
def test_profiles_can_be_ignored(name):
    """The published behaviour, which is what the file without its profile gives."""
    ignored = load_crop(FILES[name], SIDE, ignore_icc=True)
    assert np.abs(load_crop(FILES[name], SIDE).astype(int) - ignored).max() > 5
    if not name.startswith("tiff"):
        image = Image.open(io.BytesIO(FILES[name]))
        assert np.array_equal(ignored, np.asarray(image.convert("RGB")).transpose(2, 0, 1)) or image.mode == "RGBA"


def test_a_profile_that_does_not_fit_or_is_damaged_is_ignored():
    image = Image.fromarray(pixel_cases.levels(3, 8).astype(np.uint8))
    plain = load_crop(pixel_cases.pillow(image, "PNG"), SIDE)
    for icc in (pixel_cases.PROFILES["grey"], pixel_cases.cmyk_profile(), b"no profile", bytes(200)):
        assert np.array_equal(load_crop(pixel_cases.pillow(image, "PNG", icc_profile=icc), SIDE), plain)
