"""HEIC and JPEG XL: right pixels with the optional packages, and a named command without them."""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from serve.core.decode import DecodePool
from serve.core.inputs import Item, LeftOut, expand
from serve.outputs.webdataset import extension_of
from tests.vlv.data.pixel_cases import PROFILES
from vlv.data.decoding.optional import HEIF, JXL, OptionalFormatError, jxl_size, optional_format
from vlv.data.image import EXTENSIONS, ImageError, decode, file_ending, image_size, load_crop, web_image
from vlv.data.selection import Limits, select
from vlv.data.sources import open_sources

ROOT = Path(__file__).parents[3]
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
RGB = PIXELS[..., :3]
LOSSLESS = {"HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0}, "JXL": {"lossless": True}}
FORMATS = {one.name: one for one in (HEIF, JXL)}

pytestmark = pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
both = pytest.mark.parametrize("kind", ["HEIF", "JXL"])


def needs(kind: str):
    """Return the plugin's module, which also registers its encoder; skip where it is not installed."""
    module = pytest.importorskip(FORMATS[kind].module, reason=f"needs {FORMATS[kind].package}")
    if kind == "HEIF":
        module.register_heif_opener()
        if not module.libheif_info()["HEIF"]:
            pytest.skip("this pillow-heif has no encoder")
    return module


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    needs(kind)
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, kind, **{**LOSSLESS[kind], **options})
    return stream.getvalue()


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decode(content))


@both
def test_pixels_are_those_that_were_encoded(kind):
    content = encode(RGB, kind)
    assert np.array_equal(pixels(content), RGB)
    assert np.array_equal(load_crop(content, 48), RGB[:, 8:56].transpose(2, 0, 1))
    assert np.array_equal(pixels(encode(PIXELS[..., 0], kind)), np.stack([PIXELS[..., 0]] * 3, -1))
    assert optional_format(content) is FORMATS[kind] and image_size(content) == (64, 48)


@both
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(kind, mode):
    image = Image.fromarray(PIXELS if mode == "RGBA" else PIXELS[..., :2], mode)
    rgba = image.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert np.array_equal(pixels(encode(image, kind)), np.asarray(white))


@both
def test_damaged_files_and_large_ones_are_refused(kind):
    content = encode(RGB, kind)
    for torn in (content[:60], content[:-300], content[: len(content) // 2]):
        with pytest.raises(ImageError, match="damaged") as caught:
            decode(torn)
        assert caught.value.kind == "damaged" and "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="64 x 48 pixels, more than the limit of 3,000") as caught:
        decode(content, max_pixels=3000)
    assert caught.value.kind == "too-large"


@both
def test_a_large_image_is_refused_before_it_is_decoded(kind, monkeypatch):
    module = needs(kind)
    content = encode(np.zeros((1000, 2000, 3), np.uint8), kind)
    decoded = []
    if kind == "HEIF":
        load = module.HeifImageFile.load
        monkeypatch.setattr(module.HeifImageFile, "load", lambda image: decoded.append(1) or load(image))
    else:
        plugin = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
        decoder = plugin.Decoder
        monkeypatch.setattr(plugin, "Decoder", lambda **options: decoded.append(1) or decoder(**options))
    with pytest.raises(ImageError, match="2000 x 1000 pixels"):
        decode(content, max_pixels=1_999_999)
    assert not decoded
    assert decode(content, max_pixels=2_000_000).size == (2000, 1000) and decoded


def test_a_heic_file_that_is_larger_than_its_header_says_is_refused():
    content = encode(np.zeros((1000, 1000, 3), np.uint8), "HEIF")
    at = content.index(b"ispe") + 8
    with pytest.raises(ImageError, match="damaged") as caught:
        decode(content[:at] + struct.pack(">II", 16, 16) + content[at + 8 :])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", range(1, 9))
def test_heic_is_turned_once(value):
    """pillow-heif writes EXIF data and the container's rotation, as telephones do, and turns when it decodes."""
    png = io.BytesIO()
    Image.fromarray(RGB).save(png, "PNG", exif=orientation(value))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(png)))
    image = Image.fromarray(RGB)
    image.info["exif"] = orientation(value)
    content = encode(image, "HEIF")
    assert (b"irot" in content or b"imir" in content) == (value > 1)
    assert np.array_equal(pixels(content), expected) and np.array_equal(pixels(png.getvalue()), expected)
    assert image_size(content) == expected.shape[1::-1]


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("reconstructed", [True, False])
def test_jpeg_xl_of_a_jpeg_file_is_turned_once(value, reconstructed, tmp_path):
    """With the data that gives the JPEG file back, the decoder does not turn; without it, it does."""
    file = tmp_path / "a.jpg"
    smooth = Image.fromarray(RGB).resize((6, 5)).resize((64, 48), Image.Resampling.BICUBIC)
    smooth.save(file, exif=orientation(value), quality=95, subsampling=0, icc_profile=PROFILES["wide"])
    with Image.open(file) as jpeg:
        content = encode(jpeg, "JXL")
    assert b"jbrd" in content
    if not reconstructed:
        content = content.replace(b"jbrd", b"skip")
    expected, found = pixels(file.read_bytes()), pixels(content)
    assert found.shape == expected.shape
    off = np.abs(found.astype(int) - expected)
    # without that data libjxl decodes the JPEG coefficients itself
    assert off.max() == 0 if reconstructed else off.max() <= 6 and off.mean() < 1


def test_exif_orientation_in_jpeg_xl_does_not_count():
    """ISO/IEC 18181-2: the codestream's orientation alone does."""
    content = encode(RGB, "JXL", exif=orientation(6))
    assert b"Exif" in content and np.array_equal(pixels(content), RGB)


def test_ten_bits_of_heic():
    module = needs("HEIF")
    deep = np.random.default_rng(1).integers(0, 1024, (48, 64, 3)).astype(np.uint16)
    stream = io.BytesIO()
    module.from_bytes(mode="RGB;10", size=(64, 48), data=deep.tobytes()).save(stream, **LOSSLESS["HEIF"])
    assert module.open_heif(stream.getvalue(), convert_hdr_to_8bit=False).info["bit_depth"] == 10
    assert np.array_equal(pixels(stream.getvalue()), deep >> 2)


def test_sixteen_bits_of_jpeg_xl():
    """The encoder marks 16 bits as linear light: they are converted to sRGB, in 8 bits, which is coarse in shadows."""
    deep = np.random.default_rng(1).integers(0, 65536, (48, 64)).astype(np.uint16)
    content, linear = encode(deep, "JXL"), np.rint(deep / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(decode(content, ignore_icc=True))[..., 0], linear)
    light = linear / 255
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    off = np.abs(pixels(content) - srgb[..., None]).max(-1)
    assert off[linear >= 16].max() <= 1 and off.max() <= 10


def test_a_profile_of_heic_is_converted_to_srgb():
    png = io.BytesIO()
    Image.fromarray(RGB).save(png, "PNG", icc_profile=PROFILES["wide"])
    content, expected = encode(RGB, "HEIF", icc_profile=PROFILES["wide"]), pixels(png.getvalue())
    assert not np.array_equal(expected, RGB) and np.array_equal(pixels(content), expected)
    assert np.array_equal(np.asarray(decode(content, ignore_icc=True)), RGB)


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize(
    "size",
    [(1, 1), (8, 8), (64, 48), (256, 256), (250, 257), (320, 240), (96, 80), (3, 511), (513, 2), (9000, 1), (640, 360)],
)
def test_size_of_jpeg_xl_from_its_first_bytes(size, container):
    content = encode(Image.new("RGB", size, (1, 2, 3)), "JXL", use_container=container)
    assert jxl_size(content) == size == image_size(content[:200])
    for length in range(2, 14):  # never a wrong size
        try:
            assert jxl_size(content[:length]) == size
        except OptionalFormatError as error:
            assert error.kind == "damaged"


def test_size_of_jpeg_xl_in_parts():
    codestream = encode(RGB, "JXL")

    def box(kind: bytes, data: bytes, long: bool = False) -> bytes:
        head = struct.pack(">I4sQ", 1, kind, len(data) + 16) if long else struct.pack(">I4s", len(data) + 8, kind)
        return head + data

    start = box(b"JXL ", b"\r\n\x87\n") + box(b"ftyp", b"jxl \0\0\0\0jxl ") + box(b"xml ", b"<a/>", True)
    parts = [codestream[:1], codestream[1:3], codestream[3:]]
    content = start + b"".join(
        box(b"jxlp", struct.pack(">I", number | (number == 2) << 31) + part) for number, part in enumerate(parts)
    )
    assert jxl_size(content) == (64, 48) and np.array_equal(pixels(content), RGB)
    content = start + struct.pack(">I4s", 0, b"jxlc") + codestream
    assert jxl_size(content) == (64, 48) and np.array_equal(pixels(content), RGB)


def test_brands():
    def head(*brands: bytes) -> bytes:
        return struct.pack(">I4s", 8 + 4 * (len(brands) + 1), b"ftyp") + brands[0] + bytes(4) + b"".join(brands[1:])

    assert optional_format(head(b"heic", b"mif1")) is optional_format(head(b"mif1", b"mif1", b"heic")) is HEIF
    assert optional_format(head(b"mif1")) is HEIF
    for other in (head(b"avif", b"mif1"), head(b"mif1", b"avif"), head(b"isom"), b"", b"\xff\xd8\xff"):
        assert optional_format(other) is None
    avif = io.BytesIO()
    Image.fromarray(RGB).save(avif, "AVIF")
    assert optional_format(avif.getvalue()) is None and file_ending(avif.getvalue()) == ".avif"


@both
def test_names_and_types(kind):
    content = encode(RGB, kind)
    ending = FORMATS[kind].extensions[0]
    assert file_ending(content) == extension_of(content) == ending and set(FORMATS[kind].extensions) <= EXTENSIONS
    media, converted = web_image(content)
    assert media == "image/png" and np.array_equal(pixels(converted), RGB)


@both
def test_folders_shards_and_lists(kind, tmp_path, monkeypatch):
    content, (ending, *_) = encode(RGB, kind), FORMATS[kind].extensions
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path(f"a/1{ending}").write_bytes(content)
    Path(f"a/2{ending.upper()}").write_bytes(content)
    with tarfile.open("a/s.tar", "w") as tar:
        tar.add(f"a/1{ending}", f"x{ending}")
    Path("list.txt").write_text(f"a/1{ending}\n")
    left_out = LeftOut()
    items = list(expand(["a", "list.txt"], left_out))
    assert [item.id for item in items] == [f"a/1{ending}", f"a/2{ending.upper()}", f"a/s.tar/x{ending}", f"a/1{ending}"]
    assert str(left_out) == ""
    assert all(np.array_equal(pixels(item.read()), RGB) for item in items)


@both
def test_training_sources(kind, tmp_path):
    """The selection by size reads the header alone where it can: noise is longer than the part it reads."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for name, image in (("a", noise), ("b", noise[:90])):
        (tmp_path / f"{name}{FORMATS[kind].extensions[0]}").write_bytes(encode(image, kind))
    sources = open_sources([str(tmp_path)])
    assert select(sources, Limits(min_side=100)).left_out == {"too small or too long": 1}


@both
def test_decode_processes(kind, tmp_path):
    content = encode(RGB, kind)
    (tmp_path / "a").write_bytes(content)

    async def crop() -> np.ndarray:
        async with DecodePool(16, 1, 1) as pool:
            slot = await pool.slot()
            await asyncio.wait_for(pool.decode(Item("a", str(tmp_path / "a")), slot), 60)
            return pool.crops[slot].copy()

    assert np.array_equal(asyncio.run(crop()), load_crop(content, 16))


WITHOUT = """
import sys
from vlv.data.image import EXTENSIONS, ImageError, file_ending, image_size, load_crop
for name in sys.argv[1:]:
    for function in (image_size, lambda content: load_crop(content, 8)):
        try:
            function(open(name, "rb").read())
        except ImageError as error:
            print(error.kind, error, sep=": ")
print(sorted(EXTENSIONS & {".heic", ".heif", ".hif", ".jxl"}))
"""


@pytest.fixture
def without(tmp_path) -> dict[str, str]:
    """Return the environment of a process, and of those that it starts, without the optional packages."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules.update(pillow_heif=None, pillow_jxl=None)\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


# as their encoders write them: an image need not be whole to be recognised
HEADS = {
    "a.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    "b.jxl": b"\xff\x0a\xcb\x40\x24\x08" + bytes(40),
    "c.JXL": b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + bytes(40),
}


def test_without_the_packages_the_command_is_named(tmp_path, without):
    for name, content in HEADS.items():
        (tmp_path / name).write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, *HEADS], cwd=tmp_path, env=without, capture_output=True, text=True, check=True
    )
    heif = "format: HEIF files need a package that is not installed: pip install pillow-heif"
    jxl = "format: JXL files need a package that is not installed: pip install pillow-jxl-plugin"
    assert run.stdout.splitlines() == [heif] * 2 + [jxl] * 4 + ["[]"]


def test_without_the_packages_files_are_left_out_by_kind(tmp_path, without):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in HEADS.items():
        (photos / name).write_bytes(content)
    Image.fromarray(RGB).save(photos / "d.png")
    with tarfile.open(photos / "s.tar", "w") as tar:
        tar.add(photos / "a.heic", "x.heif")

    def dry(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "serve.vllm_caption", *arguments, "--dry-run"]
        return subprocess.run(command, cwd=tmp_path, env=without, capture_output=True, text=True)

    run = dry("photos", "-o", "c.jsonl")
    assert run.returncode == 0 and run.stdout.split() == ["photos/d.png"]
    assert run.stderr.splitlines()[-1] == (
        "left out: 2 .jxl (pip install pillow-jxl-plugin); 1 .heic (pip install pillow-heif); "
        "1 .heif (pip install pillow-heif)"
    )
    assert dry("photos", "-o", "c.jsonl", "--strict").returncode == 1
    (photos / "d.png").unlink()
    run = dry("photos", "-o", "c.jsonl")
    assert run.returncode == 2 and "no images in photos" in run.stderr and "(pip install pillow-heif)" in run.stderr


def test_nothing_is_imported_before_the_first_file():
    code = (
        "import sys, vlv.data.image, serve.core.inputs\n"
        "sys.exit(any(name.startswith(('pillow_heif', '_pillow_heif', 'pillow_jxl')) for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
