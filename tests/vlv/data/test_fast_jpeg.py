"""JPEG files decoded at a part of their size: their crops show the same part of the image, and other crops stay."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from tests.vlv.data.pixel_cases import PROFILES, cmyk_profile
from vlv.data.decoding.crop import CROPS
from vlv.data.image import ImageError, load_crops

SIZE = 24
BILINEAR = Image.Resampling.BILINEAR


def waves(width: int, height: int) -> Image.Image:
    """Return an image without fine detail whose every part differs: a pixel of a crop is up to 50 of 255."""
    short = min(width, height)
    y, x = np.mgrid[:height, :width] / short
    planes = [np.sin(12 * x + y), np.sin(14 * y), np.cos(9 * x - 11 * y)]
    return Image.fromarray(np.stack([128 + 90 * plane for plane in planes], -1).astype(np.uint8))


def jpeg(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 97, "subsampling": 0} | options))
    return stream.getvalue()


def oriented(image: Image.Image, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif, **options)


def both(content: bytes, crop: str = "center", **options):
    """Return the exact crops and the fast ones, which differ."""
    exact, fast = (load_crops(content, SIZE, crop, fast_jpeg=fast, **options) for fast in (False, True))
    assert fast.boxes == exact.boxes
    assert fast.pixels.shape == exact.pixels.shape and not np.array_equal(fast.pixels, exact.pixels)
    return exact.pixels.astype(int), fast.pixels.astype(int)


@pytest.mark.parametrize(("width", "height", "scale"), [(320, 288, 8), (301, 403, 8), (173, 160, 4), (100, 73, 2)])
def test_the_center_is_pillows(width, height, scale):
    """4/3 pixels remain for one of the crop; what a last block has beyond the image is left out."""
    content = jpeg(waves(width, height))
    image = Image.open(io.BytesIO(content))
    image.draft(None, (width // scale, height // scale))
    assert image.size == (-(-width // scale), -(-height // scale))
    scaled = (SIZE, int(SIZE * height / width)) if width <= height else (int(SIZE * width / height), SIZE)
    image = image.resize(scaled, BILINEAR, (0, 0, width / scale, height / scale))
    left, top = (round((side - SIZE) / 2) for side in scaled)
    expected = np.asarray(image.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)
    assert np.array_equal(load_crops(content, SIZE, fast_jpeg=True).pixels, expected[None])


@pytest.mark.parametrize("crop", CROPS)
def test_the_same_part_is_seen_however_the_camera_was_held(crop):
    """Sides that are no multiples of 8 leave part of a pixel at the right and bottom, until the image is turned."""
    sizes = [(297, 401), (401, 297), (303, 1207)]
    for (width, height), orientation in itertools.product(sizes, range(1, 9)):
        exact, fast = both(oriented(waves(width, height), orientation), crop)
        assert np.abs(fast - exact).max() <= 5, (width, height, orientation)


def test_every_kind_of_jpeg():
    image = waves(320, 299)
    cmyk = {"icc_profile": cmyk_profile()}
    contents = {
        "progressive": jpeg(image, progressive=True),
        "chroma at half the size": jpeg(image, subsampling=2),
        "grey": jpeg(image.convert("L")),
        "grey with a profile": jpeg(image.convert("L"), icc_profile=PROFILES["grey"]),
        "profile": jpeg(image, icc_profile=PROFILES["swapped"]),
        "CMYK": jpeg(image.convert("CMYK")),
        "CMYK with a profile, turned": oriented(image.convert("CMYK"), 6, **cmyk),
        "several images": jpeg(image, "MPO", save_all=True, append_images=[image]),
        "no end marker": jpeg(image)[:-2],
    }
    for name, content in contents.items():
        exact, fast = both(content)
        assert np.abs(fast - exact).max() <= 5, name
    raw, fast = (load_crops(contents["profile"], SIZE, ignore_icc=i, fast_jpeg=True).pixels for i in (True, False))
    assert not np.array_equal(raw, fast)


def test_others_stay_byte_by_byte():
    large = io.BytesIO()
    waves(400, 300).save(large, "PNG")
    for content in (large.getvalue(), jpeg(waves(63, 400)), jpeg(waves(30, 20))):  # 63: less than 2 x 4/3 x 24
        for crop in CROPS:
            exact, fast = (load_crops(content, SIZE, crop, fast_jpeg=fast) for fast in (False, True))
            assert np.array_equal(exact.pixels, fast.pixels) and exact.boxes == fast.boxes


def test_errors_are_the_same():
    content = jpeg(waves(400, 300))
    progressive = jpeg(waves(400, 300), progressive=True)
    for broken in (content[: len(content) // 2], content[:-20], content[:40], progressive[:-2], progressive[:-900]):
        failed = []
        for fast in (False, True):
            with pytest.raises(ImageError) as error:
                load_crops(broken, SIZE, fast_jpeg=fast)
            failed.append((error.value.kind, str(error.value)))
        assert failed[0] == failed[1]
    with pytest.raises(ImageError, match=r"400 x 300 pixels, more than the limit of 119,999"):
        load_crops(content, SIZE, max_pixels=119_999, fast_jpeg=True)
