"""What the model sees of an image: each crop against Pillow's own operations."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.vlv.data.pixel_cases import PROFILES
from vlv.data.decoding.crop import CROPS, MAX_TILES, PAD_COLOR, boxes
from vlv.data.image import load_crop, load_crops

SIZE = 24
BILINEAR = Image.Resampling.BILINEAR
SIZES = [(90, 60), (60, 90), (91, 60), (60, 107), (24, 24), (48, 48), (25, 24), (7, 5), (300, 41), (1, 1), (1, 60)]


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def planes(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_squash_and_pad_are_pillows(width, height):
    image = photo(width, height)
    squashed, padded = (load_crops(png(image), SIZE, crop) for crop in ("squash", "pad"))
    assert np.array_equal(squashed.pixels, planes(image.resize((SIZE, SIZE), BILINEAR))[None])
    if SIZE * min(width, height) >= max(width, height):  # Pillow refuses to make a side of no pixel
        expected = ImageOps.pad(image, (SIZE, SIZE), BILINEAR, PAD_COLOR)
        assert np.array_equal(padded.pixels, planes(expected)[None])
    assert squashed.boxes == padded.boxes == [(0, 0, width, height)]


def test_pad_of_a_thread_keeps_one_pixel():
    red = Image.new("RGB", (1, 1000), "red")
    (pixels,) = load_crops(png(red), SIZE, "pad").pixels
    seen = (pixels.transpose(1, 2, 0) == (255, 0, 0)).all(-1)
    assert seen.sum() == SIZE and seen.any(1).all()
    assert {tuple(color) for color in pixels.transpose(1, 2, 0)[~seen]} == {PAD_COLOR}


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_are_squares_of_the_resized_image(width, height):
    """Each is where its box says, and the first and the last touch the ends."""
    image, short = photo(width, height), min(width, height)
    found = load_crops(png(image), SIZE, "tiles")
    scaled = (SIZE, int(SIZE * height / width)) if width <= height else (int(SIZE * width / height), SIZE)
    resized = planes(image.resize(scaled, BILINEAR))
    ends = [resized[:, :SIZE, :SIZE], resized[:, -SIZE:, -SIZE:]]
    assert np.array_equal(found.pixels[[0, -1]], ends)
    assert len(found.boxes) == len(found.pixels)
    for (left, top, right, bottom), pixels in zip(found.boxes, found.pixels, strict=True):
        assert right - left == bottom - top == short and 0 <= left <= width - short and 0 <= top <= height - short
        corners = itertools.product(around(top, short), around(left, short))
        assert any(np.array_equal(pixels, resized[:, y : y + SIZE, x : x + SIZE]) for y, x in corners)


def around(place: int, short: int) -> range:
    """Return where a side of a box may lie in the resized image: the box is rounded to a pixel, and so is the cut."""
    scale = SIZE / short
    return range(max(0, int((place - 0.5) * scale)), int((place + 0.5) * scale) + 2)


def test_tiles_cover_the_image_and_overlap():
    assert boxes(160, 90, "tiles") == [(0, 0, 90, 90), (70, 0, 160, 90)]
    assert boxes(100, 100, "tiles") == [(0, 0, 100, 100)]
    assert boxes(50, 100, "tiles") == [(0, 0, 50, 50), (0, 25, 50, 75), (0, 50, 50, 100)]
    for long in range(100, 2000):
        found = boxes(long, 100, "tiles")
        assert found[0][0] == 0 and found[-1][2] == long
        assert (len(found) == 1) == (long == 100) and len(found) <= MAX_TILES
        steps = {b[0] - a[0] for a, b in itertools.pairwise(found)}
        if long <= 660:
            assert all(step <= 81 for step in steps)  # an overlap of a fifth, less the rounding
            assert len(found) < 3 or (long - 100) / (len(found) - 2) > 80  # and no square more than that needs


def test_a_panorama_that_would_not_fit_in_memory():
    """Only the squares are resized: 40,000 x 10 pixels would become 96,000 x 24."""
    image = Image.new("RGB", (40_000, 10), "blue")
    image.paste("red", (0, 0, 20, 10))
    found = load_crops(png(image), SIZE, "tiles", max_pixels=1_000_000)
    assert len(found.pixels) == MAX_TILES
    assert (found.pixels.mean((2, 3))[0] == (255, 0, 0)).all() and (found.pixels.mean((2, 3))[1:] == (0, 0, 255)).all()


def test_center_is_the_published_crop():
    content = png(photo(90, 60))
    found = load_crops(content, SIZE)
    assert np.array_equal(found.pixels[0], load_crop(content, SIZE)) and found.boxes == [(15, 0, 75, 60)]


@pytest.mark.parametrize("crop", CROPS)
def test_profiles_and_orientation_come_first(crop):
    """The square of a tagged, turned image is that of the image as a viewer shows it; padding has no profile."""
    image = photo(80, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    turned = load_crops(png(image, exif=exif), SIZE, crop)
    assert np.array_equal(
        turned.pixels, load_crops(png(image.transpose(Image.Transpose.ROTATE_270)), SIZE, crop).pixels
    )
    profile = next(iter(PROFILES.values()))
    tagged = load_crops(png(image, icc_profile=profile), SIZE, crop)
    assert tagged.pixels.shape == load_crops(png(image), SIZE, crop).pixels.shape
    if crop == "pad":
        assert tuple(tagged.pixels[0, :, 0, 0]) == tuple(tagged.pixels[0, :, -1, -1]) == PAD_COLOR
