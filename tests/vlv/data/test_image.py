"""Decoding: every kind of file becomes the right crop, or an ImageError that says what is wrong."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlv.data.image import ImageError, load_crop

SHARED = Path(__file__).parents[4] / "shared"


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 90, height: int = 60) -> np.ndarray:
    """A smooth picture [height, width, 3] whose four corners differ."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def failure(source, size: int = 8, **options) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_crop(source, size, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.skipif(not (SHARED / "official" / "expected.npz").exists(), reason="needs ../shared/official")
def test_equals_the_published_preprocessing():
    expected = np.load(SHARED / "official" / "expected.npz")["crop"]
    names = (SHARED / "official" / "images.txt").read_text().split()
    for name, crop in zip(names, expected, strict=True):
        assert np.array_equal(load_crop(SHARED / "images" / name, crop.shape[-1]), crop), name


@pytest.mark.parametrize(
    "width, height", [(90, 60), (60, 90), (61, 90), (90, 61), (8, 8), (9, 8), (17, 8), (1, 1), (1, 7)]
)
def test_resizes_and_crops_as_torchvision(width, height):
    """torchvision: the long side is int(size * long / short), the crop's corner int(round((side - size) / 2))."""
    image, size = Image.fromarray(picture(width, height)), 8
    short, long = min(width, height), max(width, height)
    resized = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    pixels = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    top, left = (round((side - size) / 2.0) for side in pixels.shape[:2])
    expected = pixels[top : top + size, left : left + size].transpose(2, 0, 1)
    crop = load_crop(encode(image, "PNG"), size)
    assert crop.dtype == np.uint8 and crop.flags.c_contiguous
    assert np.array_equal(crop, expected)


def test_path_and_content_give_the_same(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encode(Image.fromarray(picture()), "PNG"))
    assert np.array_equal(load_crop(file, 16), load_crop(file.read_bytes(), 16))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "JPEG2000", "PPM"])
def test_formats(kind):
    flat = Image.new("RGB", (20, 20), (200, 60, 90))
    assert np.abs(load_crop(encode(flat, kind), 8).mean((1, 2)) - (200, 60, 90)).max() < 8


def test_exif_rotation():
    """A camera held on its side: the pixels lie, EXIF says how."""
    upright = Image.fromarray(picture(60, 60))
    for orientation, turn in {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.items():  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(turn)  # turning it as the tag says gives the upright picture back
        crop = load_crop(encode(stored, "PNG", exif=exif), 60)
        assert np.array_equal(crop.transpose(1, 2, 0), picture(60, 60)), orientation


def test_damaged_exif_is_ignored():
    content = encode(Image.fromarray(picture()), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert load_crop(content, 8).shape == (3, 8, 8)


def test_sixteen_bit_greys_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    crop = load_crop(encode(Image.fromarray(ramp.astype(np.uint16)), "PNG"), 64)
    assert np.array_equal(crop[0], np.rint(ramp.astype(np.uint16) / 257).astype(np.uint8))
    assert np.array_equal(crop[0], crop[2])
    floats = load_crop(encode(Image.fromarray((ramp / 7 - 3).astype(np.float32)), "TIFF"), 64)
    assert np.abs(floats[0].astype(int) - crop[0]).max() <= 1
    constant = load_crop(encode(Image.fromarray(np.full((9, 9), 3.5, np.float32)), "TIFF"), 8)
    assert (constant == 4).all()  # its value, rounded
    assert failure(encode(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF")).kind == "damaged"


def test_cmyk():
    crop = load_crop(encode(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), 8)
    assert np.abs(crop.mean((1, 2)) - (255, 0, 0)).max() < 8


def test_palette_grey_and_bilevel():
    red = Image.new("P", (20, 20), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    assert (load_crop(encode(red, "PNG"), 8).mean((1, 2)) == (255, 0, 0)).all()
    assert (load_crop(encode(Image.new("L", (20, 20), 77), "PNG"), 8) == 77).all()
    assert (load_crop(encode(Image.new("1", (20, 20), 1), "PNG"), 8) == 255).all()


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    assert np.abs(load_crop(encode(half, "PNG"), 8).mean((1, 2)) - (255, 127, 127)).max() <= 1
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert (load_crop(encode(clear, "PNG"), 8) == 255).all()
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (load_crop(encode(palette, "PNG", transparency=1), 8) == 255).all()
    assert (load_crop(encode(Image.new("L", (20, 20), 5), "PNG", transparency=5), 8) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (20, 20), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {} if kind == "TIFF" else {"duration": 100}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(load_crop(content, 8).mean((1, 2)) - (250, 0, 0)).max() < 8


def test_one_pixel_and_threads():
    one = load_crop(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), 64)
    assert (one == np.array([9, 8, 7])[:, None, None]).all()
    # 1 x 30000: resized whole, this would be 64 x 1,920,000 pixels
    thread = np.zeros((30000, 1, 3), np.uint8)
    thread[14000:16000] = 200
    crop = load_crop(encode(Image.fromarray(thread), "PNG"), 64, max_pixels=1_000_000)
    assert (crop == 200).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encode(Image.fromarray(noise), kind)
    assert failure(content[: len(content) // 2]).kind in ("damaged", "format")
    assert failure(content[:12]).kind in ("damaged", "format")


def test_damaged_in_the_middle():
    content = bytearray(encode(Image.fromarray(picture(200, 200)), "PNG"))
    content[len(content) // 2] ^= 0xFF
    assert failure(bytes(content)).kind == "damaged"


def test_what_is_no_image(tmp_path):
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.jpg"
    empty.touch()
    text.write_text("this is no picture\n" * 20)
    assert failure(empty).kind == "empty"
    assert failure(text).kind == "format"
    assert failure(tmp_path / "absent.jpg").kind == "missing"
    assert failure(tmp_path).kind == "unreadable"
    # PostScript would make Pillow run Ghostscript on an untrusted file
    assert failure(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n").kind == "format"


def test_bombs_are_refused_before_decoding(bomb):
    assert failure(bomb(30000, 30000)).kind == "too-large"
    assert "12000 x 12000" in str(failure(bomb(12000, 12000), max_pixels=100_000_000))
    assert failure(bomb(10, 10), max_pixels=99).kind == "too-large"


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("format", "no image")))
    assert error.kind == "format" and str(error) == "no image"
