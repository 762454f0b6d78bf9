"""Decoding: every kind of file becomes the right crop, or an ImageError that says what is wrong."""

from __future__ import annotations

import ast
import base64
import io
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.vlv.data import pixel_cases
from vlv.data.image import EXTENSIONS, FORMATS, ImageError, file_ending, image_size, load_crop, web_image

SHARED = Path(__file__).parents[4] / "shared"


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int = 90, height: int = 60) -> np.ndarray:
    """A smooth image [height, width, 3] whose four corners differ."""
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
    image, size = Image.fromarray(gradient(width, height)), 8
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
    file.write_bytes(encode(Image.fromarray(gradient()), "PNG"))
    assert np.array_equal(load_crop(file, 16), load_crop(file.read_bytes(), 16))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "JPEG2000", "PPM"])
def test_formats(kind):
    flat = Image.new("RGB", (20, 20), (200, 60, 90))
    assert np.abs(load_crop(encode(flat, kind), 8).mean((1, 2)) - (200, 60, 90)).max() < 8


def test_exif_rotation():
    """A camera held on its side: the pixels lie, EXIF says how."""
    upright = Image.fromarray(gradient(60, 60))
    for orientation, turn in {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.items():  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(turn)  # turning it as the tag says gives the upright image back
        crop = load_crop(encode(stored, "PNG", exif=exif), 60)
        assert np.array_equal(crop.transpose(1, 2, 0), gradient(60, 60)), orientation


def test_damaged_exif_is_ignored():
    content = encode(Image.fromarray(gradient()), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
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


# lossless files of imagecodecs 2026.3.6 (OpenJPEG 2.5.4): levels from 0 to 2^bits - 1 in equal steps, [2, 2, channels]
DEEP_JPEG2000 = {
    (16, 3): "/0//UQAvAAAAAAACAAAAAgAAAAAAAAAAAAAAAgAAAAIAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/ZAAl"
    "AAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAA2AAH/k8/8MCgGyTsRZ7d2ZuI/w/8ABAAB1Ptnhmd8P8P/AAQA"
    "CI0PZ4Znkb//2Q==",
    (16, 4): "AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAAAgAAAAIABA8HAAAAAAAPY29scgEAAAAA"
    "ABAAAAC+anAyY/9P/1EAMgAAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAABA8BAQ8BAQ8BAQ8BAf9SAAwAAAABAAAEBAAB/1wA"
    "BECA/2QAJQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJzaW9uIDIuNS40/5AACgAAAAAAQwAB/5Pf+JBIB7frjDapArKhz/wwJAbQbu4cj6u8"
    "p8/8MCgGxHGw/xWsgT5/z/wwJAbEQlXvfsqMp//Z",
    (12, 2): "AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAAAgAAAAIAAgsHAAAAAAAPY29scgEAAAAA"
    "ABEAAACYanAyY/9P/1EALAAAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAAgsBAQsBAf9SAAwAAAABAAAEBAAB/1wABEBg/2QA"
    "JQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJzaW9uIDIuNS40/5AACgAAAAAAIwAB/5Pf4CAHuA7b+bbbv8/kHAbEaEbx4V//2Q==",
}


@pytest.mark.parametrize(("bits", "channels"), DEEP_JPEG2000)
def test_the_brightest_levels_of_deep_jpeg2000(bits, channels):
    """Pillow 13.0 makes them black, and an opaque alpha channel transparent."""
    shares = np.linspace(0, 1, 4 * channels).reshape(2, 2, channels)
    alpha = shares[..., -1:] if channels in (2, 4) else 1
    color = shares[..., : 3 if channels > 2 else 1] * alpha + 1 - alpha
    crop = load_crop(base64.b64decode(DEEP_JPEG2000[bits, channels]), 2).transpose(1, 2, 0)
    assert np.abs(crop - 255 * color).max() <= 1.5  # half a level of rounding, and one as 65,535 / 256 is 256


def test_a_palette_image_without_a_palette_is_damaged():
    content = pixel_cases.png(pixel_cases.levels(1, 8), 8, 3)
    assert failure(content).kind == "damaged" and "cannot be converted to RGB" in str(failure(content))


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
    content = bytearray(encode(Image.fromarray(gradient(200, 200)), "PNG"))
    content[len(content) // 2] ^= 0xFF
    assert failure(bytes(content)).kind == "damaged"


def test_what_is_no_image(tmp_path):
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.jpg"
    empty.touch()
    text.write_text("this is no image\n" * 20)
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


def png_with(*chunks: tuple[bytes, bytes], damaged: bool = False) -> bytes:
    """A PNG file with these chunks after its header; `damaged`: the last one has a wrong checksum."""
    content = encode(Image.fromarray(gradient()), "PNG")
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ (damaged * 1))
        for name, data in chunks
    ]
    return content[:33] + b"".join(parts) + content[33:]


def test_large_and_damaged_side_data_of_png_does_not_matter(tmp_path):
    """Pillow alone refuses text and profiles of more than a mebibyte, and damaged chunks that it does not need."""
    plain = load_crop(png_with(), 16)
    megabytes = zlib.compress(bytes(64 << 20), 9)
    for chunks, damaged in (
        ([(b"zTXt", b"Comment\0\0" + megabytes)], False),
        ([(b"iTXt", b"Comment\0\1\0\0\0" + megabytes)], False),
        ([(b"tEXt", b"Comment\0" + b"x" * (3 << 20))], False),
        ([(b"iCCP", b"profile\0\0" + megabytes)], False),
        ([(b"tEXt", b"Comment\0text")], True),
        ([(b"iCCP", b"profile\0\0" + zlib.compress(b"x"))], True),
        ([(b"tIME", b"")], True),
    ):
        content = png_with(*chunks, damaged=damaged)
        tracemalloc.start()
        assert np.array_equal(load_crop(content, 16), plain), chunks[0][0]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 << 20  # a profile may take 16 MiB
    large = zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(2 << 20))
    assert np.array_equal(load_crop(png_with((b"iCCP", b"profile\0\0" + large)), 16), plain)
    key = (b"tRNS", struct.pack(">3H", *gradient()[0, 0]))
    text = (b"zTXt", b"Comment\0\0" + megabytes)
    assert np.array_equal(load_crop(png_with(text, key), 60), load_crop(png_with(key), 60))
    assert failure(png_with((b"PLTE", bytes(5)), damaged=True)).kind in ("damaged", "format")


@pytest.mark.parametrize("options", [{}, {"quality": 40, "subsampling": 2}, {"restart_marker_blocks": 3}])
def test_jpeg_without_its_end_marker(options):
    """All pixels are there: it is decoded. Any of them missing, or passes that may be missing: it is damaged."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)
    for pixels in (noise, gradient()):
        content = encode(Image.fromarray(pixels), "JPEG", **options)
        assert np.array_equal(load_crop(content[:-2], 16), load_crop(content, 16))
        assert failure(content[: len(content) * 9 // 10]).kind == "damaged"
    grey = encode(Image.fromarray(noise).convert("L"), "JPEG", **options)
    assert np.array_equal(load_crop(grey[:-2], 16), load_crop(grey, 16))
    progressive = encode(Image.fromarray(noise), "JPEG", progressive=True, **options)
    assert load_crop(progressive, 16).shape == (3, 16, 16)
    assert failure(progressive[:-2]).kind == "damaged"


def test_every_cut_of_a_jpeg_is_damaged_or_whole():
    content = encode(Image.fromarray(gradient(40, 40)), "JPEG", quality=30)
    whole = load_crop(content, 40)
    for end in range(len(content) - 60, len(content)):
        try:
            assert np.array_equal(load_crop(content[:end], 40), whole), end
        except ImageError as error:
            assert error.kind == "damaged"


def test_media_types_follow_the_content():
    image = Image.fromarray(gradient())
    for kind, expected in (("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")):
        content = encode(image, kind)
        assert web_image(content) == (f"image/{expected}", content)
    for kind in ("BMP", "TIFF", "AVIF", "JPEG2000", "PPM"):
        content = encode(image, kind)
        media_type, converted = web_image(content)
        assert media_type == "image/png" and converted.startswith(b"\x89PNG")
        assert np.array_equal(load_crop(converted, 16), load_crop(content, 16))
    assert failure_of(web_image, b"%!PS-Adobe-3.0 EPSF-3.0").kind == "format"


def failure_of(function, content: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        function(content)
    return caught.value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_size_and_ending_without_decoding(kind):
    content = encode(Image.fromarray(gradient(90, 60)), kind)
    assert image_size(content) == (90, 60)
    assert file_ending(content) in EXTENSIONS


def test_layouts_that_are_not_supported_are_named():
    samples = np.zeros((4, 4, 3), np.uint16)
    for content, named in (
        (pixel_cases.tiff(samples, 8), "3 unsigned samples of 16 bits"),
        (pixel_cases.tiff(np.zeros((4, 4, 3), np.float32), 6), "3 float samples of 32 bits"),
        (pixel_cases.tiff(samples, 2, planar=True, tags={259: (3, [7])}), "compression 7"),
        (pixel_cases.tiff(samples.astype(np.uint8), 2, tags={259: (3, [34712])}), "compression 34712"),
    ):
        error = failure(content)
        assert error.kind in ("format", "damaged") and named in str(error)


def test_a_deep_tiff_larger_than_the_limit_is_refused_before_decoding():
    content = pixel_cases.tiff(np.zeros((64, 64, 3), np.float32), 2)
    assert "64 x 64" in str(failure(content, max_pixels=4000)) and failure(content, max_pixels=4000).kind == "too-large"


def test_images_are_opened_in_two_places_by_one_list_of_formats():
    """Here and in the edge bundle's program: Pillow's full list includes formats that start other programs."""
    root = Path(__file__).parents[3]
    found = []
    for package in ("kernels", "vlv", "export", "serve"):
        for file in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node).endswith("Image.open"):
                    found.append(f"{file.relative_to(root)}")
                if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                    found.append(f"{file.relative_to(root)}")
    assert found == ["vlv/data/image.py", "export/edge_bundle/caption.py"]
    assert f'Image.open(file, formats="{" ".join(FORMATS)}".split())' in (root / found[1]).read_text()
    assert "Image.open(io.BytesIO(content), formats=FORMATS)" in (root / found[0]).read_text()
