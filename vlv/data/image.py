"""Decode image files to uint8 crops: the only module that opens and prepares images.

The crop equals torchvision's `Resize(size)` and `CenterCrop(size)` of the published preprocessing
pixel by pixel. Imports only Pillow and numpy, so that a decode process starts fast; what HEIC and JPEG XL need
is imported when the first such file comes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from vlv.common.command import MISUSED, UserError, one_line, why
from vlv.data.decoding.color import lab_to_srgb, srgb_transform
from vlv.data.decoding.crop import Box, Extent, boxes, padded, sides_of, squares
from vlv.data.decoding.jpeg import START, with_end_marker
from vlv.data.decoding.jpeg2000 import with_highlights
from vlv.data.decoding.optional import (
    HEIF,
    JXL,
    OPTIONAL_FORMATS,
    OptionalFormat,
    OptionalFormatError,
    jxl_size,
    open_heif,
    open_jxl,
    optional_format,
)
from vlv.data.decoding.png import SIGNATURE, with_transparency, without_side_data
from vlv.data.decoding.tiff import MAGIC, TiffError, decode_tiff, scale_floats, tiff_size

FAST_JPEG = 4 / 3  # with fast_jpeg, both sides are decoded to so many pixels or more for one of the crop
MAX_PIXELS = 178_956_970  # Pillow's own refusal: 2/3 of a GiB as RGBA

# Only formats that Pillow decodes in the process itself: EPS, for one, would run Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .avif .jp2 .j2k .ppm .pgm .pbm .pnm".split()
).union(*(optional.extensions for optional in OPTIONAL_FORMATS if optional.installed))

# of each of FORMATS, one of EXTENSIONS; Pillow calls a JPEG file of several images MPO
_ENDINGS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "DIB": ".bmp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "JPEG2000": ".jp2",
    "PPM": ".ppm",
}

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError, ValueError):
    """Raised for a file that cannot be decoded; `kind` is missing, unreadable, empty, format, damaged or too-large."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind
        if kind == "missing":
            self.exit_code = MISUSED

    def __reduce__(self):
        return ImageError, (self.kind, str(self))


@dataclass(frozen=True)
class Crops:
    """What the model sees of one image."""

    pixels: np.ndarray  # uint8 [N, 3, size, size]; N is 1 but for tiles
    boxes: list[Box]  # the part of the upright image that each square shows


def load_crops(
    source: str | Path | bytes,
    size: int,
    crop: str = "center",
    max_pixels: int = MAX_PIXELS,
    ignore_icc: bool = False,
    fast_jpeg: bool = False,
) -> Crops:
    """Decode a file (path or content) as `decode` does, and cut its squares in one of `vlv.data.decoding.crop.CROPS`.

    `fast_jpeg`: decode a JPEG file at 1/2, 1/4 or 1/8 of its size, if FAST_JPEG * size pixels of both sides remain;
    its pixels differ a little then. Raises ImageError.
    """
    with _quiet():
        image = _load(source, max_pixels, round(FAST_JPEG * size) if fast_jpeg else None)
        return _crops(image, size, crop, max_pixels, ignore_icc)


def load_crop(
    source: str | Path | bytes, size: int, max_pixels: int = MAX_PIXELS, ignore_icc: bool = False
) -> np.ndarray:
    """Return the centre square of a file (path or content), the published crop, uint8 [3, size, size].

    Raises ImageError.
    """
    return load_crops(source, size, "center", max_pixels, ignore_icc).pixels[0]


def crop_image(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre square of an image that Pillow has opened, as `load_crop` does of its file.

    Only what Pillow decodes otherwise than `load_crop` (some TIFF and damaged files) may differ. Raises ImageError.
    """
    with _quiet():
        _require_size(image.width, image.height, MAX_PIXELS)
        try:
            upright = _eight_bits(_upright(image))
        except Exception as error:  # it is decoded only now
            raise ImageError("damaged", f"the {image.format} data is damaged or truncated: {error}") from error
        return _crops(upright, size, "center", MAX_PIXELS, ignore_icc=False).pixels[0]


def decode(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, ignore_icc: bool = False) -> Image.Image:
    """Decode a file (path or content), turn it upright, make it RGB.

    Transparency is laid on white, deeper samples are scaled to 8 bits, an animation gives its first frame. Colours of
    an ICC profile are converted to sRGB, unless `ignore_icc`, which is the published behaviour; images without a
    profile, or with sRGB's, give the same pixels either way. Images of more than `max_pixels` are refused before they
    are decoded. Raises ImageError.
    """
    with _quiet():
        image = _load(source, max_pixels)
        return _rgb(image, None if ignore_icc else image.info.get("icc_profile"))


def web_image(content: bytes) -> tuple[str, bytes]:
    """Return an image's media type and content as any web service takes it.

    JPEG, PNG, WebP and GIF stay as they are, by their content and not by a name; other formats become PNG, upright, in
    sRGB. Raises ImageError.
    """
    if content.startswith(SIGNATURE):
        return "image/png", content
    if content.startswith(START):
        return "image/jpeg", content
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif", content
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp", content
    return "image/png", png(np.asarray(decode(content)).transpose(2, 0, 1))


def file_ending(content: bytes) -> str:
    """Return the file name's ending for an image file's content, such as ".jpg". Raises ImageError."""
    for start, ending in ((SIGNATURE, ".png"), *((magic, ".tif") for magic in MAGIC)):
        if content.startswith(start):  # Pillow cannot open every file of these that is read here
            return ending
    if optional := optional_format(content):
        return optional.extensions[0]
    return _ENDINGS[_open(content, MAX_PIXELS).format]


def image_size(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height from a file's header; the first bytes may be enough. Raises ImageError."""
    if content.startswith(SIGNATURE) and len(content) >= 24:
        size = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    elif JXL.installed and optional_format(content) is JXL:
        with _optional_errors():
            size = jxl_size(content)
    elif not content.startswith(MAGIC) or not (size := tiff_size(content)):
        with _quiet():
            return _open(content, max_pixels).size
    _require_size(*size, max_pixels)
    return size


def read_rgba(source: str | Path | bytes) -> Image.Image:
    """Decode a file to an upright RGBA image, without its profile. Raises ImageError."""
    with _quiet():
        return _load(source, MAX_PIXELS).convert("RGBA")


def png(image: np.ndarray) -> bytes:
    """Encode an RGB image uint8 [3, H, W] as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
    return file.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings of odd metadata and of large images: here an image is usable or an ImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # Pillow's conversions raise AssertionError, ValueError and others
            raise ImageError("damaged", f"its pixels cannot be converted to RGB ({one_line(error)})") from error


def _load(source: str | Path | bytes, max_pixels: int, min_side: int | None = None) -> Image.Image:
    """Return the upright image of a file, in a mode of 8 bits. Raises ImageError.

    `min_side`: a JPEG file may be decoded at 1 / scale of its size, if so many pixels of both sides remain; `info` then
    has scale and extent as "reduced".
    """
    content = source if isinstance(source, bytes) else _read(source)
    if not content:
        raise ImageError("empty", "the file is empty (0 bytes)")
    image = None
    try:
        if content.startswith(MAGIC):
            image = decode_tiff(content, max_pixels)
        image = image or _pillow(content, max_pixels, min_side)
        return _eight_bits(_upright(image))
    except ImageError:
        raise
    except TiffError as error:
        raise ImageError(error.kind, str(error)) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        name = f"{image.format} data" if image and image.format else "data"
        raise ImageError("damaged", f"the {name} is damaged or truncated: {error}") from error


def _pillow(content: bytes, max_pixels: int, min_side: int | None) -> Image.Image:
    """Decode with Pillow; what only Pillow's limits refuse is tried again without it. Raises ImageError."""
    try:
        return _loaded(content, max_pixels, min_side)
    except ImageError as error:
        if content.startswith(SIGNATURE) and error.kind in ("damaged", "format"):
            bare, profile = without_side_data(content)
            if len(bare) < len(content):
                image = _loaded(bare, max_pixels)
                image.info["icc_profile"] = profile
                return image
        elif content.startswith(START) and error.kind == "damaged" and (completed := with_end_marker(content)):
            return _loaded(completed, max_pixels, min_side)
        elif content.startswith(MAGIC) and error.kind == "format" and (image := decode_tiff(content, max_pixels, True)):
            return image
        raise


def _loaded(content: bytes, max_pixels: int, min_side: int | None = None) -> Image.Image:
    image = _open(content, max_pixels)
    width = image.width
    if min_side and (drafted := image.draft(None, (min_side, min_side))):  # None but for JPEG
        _, extent = drafted
        image.info["reduced"] = round(width / extent[2]), extent
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        about = " ".join(str(error).split())
        raise ImageError("damaged", f"the {image.format} data is damaged or truncated: {about}") from error
    if image.format == "JPEG2000":
        return with_highlights(image, content)
    return with_transparency(image, content) if content.startswith(SIGNATURE) else image


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ImageError("missing", "there is no such file") from error
    except OSError as error:
        raise ImageError("unreadable", f"cannot read the file: {why(error)}") from error


def _open(content: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        if optional := optional_format(content):
            return _open_optional(content, optional, max_pixels)
        raise ImageError("format", f"not recognised as an image ({', '.join(FORMATS)} are read)") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"the header announces more than {max_pixels:,} pixels") from error
    except Exception as error:
        raise ImageError("damaged", f"the header is damaged: {error}") from error
    _require_size(image.width, image.height, max_pixels)
    return image


def _open_optional(content: bytes, optional: OptionalFormat, max_pixels: int) -> Image.Image:
    with _optional_errors():
        if optional is JXL and JXL.installed:
            _require_size(*jxl_size(content), max_pixels)  # opening it decodes it
        image = open_heif(content) if optional is HEIF else open_jxl(content)
    _require_size(image.width, image.height, max_pixels)
    return image


@contextmanager
def _optional_errors() -> Iterator[None]:
    try:
        yield
    except OptionalFormatError as error:
        raise ImageError(error.kind, str(error)) from error


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        message = f"the header announces {width} x {height} pixels, more than the limit of {max_pixels:,}"
        raise ImageError("too-large", message)


def _upright(image: Image.Image) -> Image.Image:
    """Turn a loaded image as its EXIF data, or decode_tiff, says."""
    try:
        orientation = image.info.pop("orientation", None) or image.getexif().get(_EXIF_ORIENTATION, 1)
        turn = _UPRIGHT.get(orientation)
    except Exception:  # damaged EXIF says nothing about the pixels
        return image
    if turn is None:
        return image
    upright = image.transpose(turn)
    if "reduced" in image.info:
        scale, extent = image.info["reduced"]
        upright.info["reduced"] = scale, _turned(extent, orientation, upright.size)
    return upright


def _turned(extent: Extent, orientation: int, size: tuple[int, int]) -> Extent:
    """Return an extent from the top left corner of an image as it lies once the image is turned, and has `size`."""
    width, height = sides_of(extent) if orientation < 5 else reversed(sides_of(extent))
    left = size[0] - width if orientation in (2, 3, 6, 7) else 0
    top = size[1] - height if orientation in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _crops(image: Image.Image, size: int, crop: str, max_pixels: int, ignore_icc: bool) -> Crops:
    """Return the squares of an upright image in a mode of 8 bits."""
    scale, extent = image.info.get("reduced", (1, (0, 0, *image.size)))
    profile = None if ignore_icc else image.info.get("icc_profile")
    transform = None if image.has_transparency_data else srgb_transform(profile, image.mode)
    if transform is None:
        parts = squares(_rgb(image, profile), size, crop, max_pixels, extent)
    else:  # the squares have far fewer pixels to convert
        parts = squares(image, size, crop, max_pixels, extent)
        parts = [ImageCms.applyTransform(part, transform) for part in parts]
    pixels = np.stack([[np.asarray(plane) for plane in padded(part, size).split()] for part in parts])
    sides = (round(scale * side) for side in sides_of(extent))
    return Crops(pixels, boxes(*sides, crop))


def _rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB, in sRGB where there is a profile, with transparency laid on white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        color = rgba.getchannel("R") if image.mode in ("L", "LA", "1") else rgba.convert("RGB")
        if transform := srgb_transform(profile, color.mode):
            red, green, blue = ImageCms.applyTransform(color, transform).split()
            rgba = Image.merge("RGBA", (red, green, blue, rgba.getchannel("A")))
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "LAB":
        return lab_to_srgb(image)
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    transform = srgb_transform(profile, image.mode)
    if transform:
        return ImageCms.applyTransform(image, transform)
    return image if image.mode == "RGB" else image.convert("RGB")  # converting RGB to RGB copies all pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale greys of 16 bits and floats to 8 bits (Pillow's own conversion would clip them); other modes stay.

    Premultiplied grey becomes plain grey and alpha, since Pillow converts it to nothing else.
    """
    if image.mode == "La":
        return image.convert("LA")
    if image.mode != "I" and image.mode != "F" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float32)
    values = scale_floats(values) if image.mode == "F" else values.clip(0, 65535) * (255 / 65535)
    grey = Image.fromarray(np.rint(values).astype(np.uint8))
    grey.info = image.info
    return grey
