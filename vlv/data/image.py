"""Decode image files to uint8 crops: the only module that opens and prepares images.

The crop equals torchvision's `Resize(size)` and `CenterCrop(size)` of the published preprocessing
pixel by pixel. Imports only Pillow and numpy, so that a decode process starts fast.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from vlv.common.command import UserError, why

MAX_PIXELS = 178_956_970  # Pillow's own refusal: 2/3 of a GiB as RGBA

# Only formats that Pillow decodes in the process itself: EPS, for one, would run Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .avif .jp2 .j2k .ppm .pgm .pbm .pnm".split()
)

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

    def __reduce__(self):
        return ImageError, (self.kind, str(self))


def load_crop(source: str | Path | bytes, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a file (path or content) as `decode` does, resize its short side, crop the centre.

    Returns uint8 [3, size, size]. Raises ImageError.
    """
    image = centre(decode(source, max_pixels), size, max_pixels)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file (path or content), turn it upright, make it RGB.

    Transparency is laid on white, 16-bit greys are scaled, an animation gives its first frame. Images of more than
    `max_pixels` are refused before they are decoded. Raises ImageError.
    """
    content = source if isinstance(source, bytes) else _read(source)
    if not content:
        raise ImageError("empty", "the file is empty (0 bytes)")
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of large images; here an image is usable or an ImageError
        warnings.simplefilter("ignore")
        image = _open(content, max_pixels)
        try:
            return _rgb(_upright(image))
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
            raise ImageError("damaged", f"the {image.format} data is damaged or truncated: {error}") from error


def image_size(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height from a file's header; the first bytes may be enough. Raises ImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _open(content, max_pixels).size


def web_image(content: bytes) -> tuple[str, bytes]:
    """Return an image's media type and content as any web service takes it.

    JPEG, PNG, WebP and GIF stay as they are, by their content and not by a name; other formats become PNG.
    Raises ImageError.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", content
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", content
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif", content
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp", content
    return "image/png", png(np.asarray(decode(content)).transpose(2, 0, 1))


def file_ending(content: bytes) -> str:
    """Return the file name's ending for an image file's content, such as ".jpg". Raises ImageError."""
    return _ENDINGS[_open(content, MAX_PIXELS).format]


def png(image: np.ndarray) -> bytes:
    """Encode an RGB image uint8 [3, H, W] as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
    return file.getvalue()


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
        raise ImageError("format", f"not recognised as an image ({', '.join(FORMATS)} are read)") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"the header announces more than {max_pixels:,} pixels") from error
    except Exception as error:
        raise ImageError("damaged", f"the header is damaged: {error}") from error
    if image.width * image.height > max_pixels:
        raise ImageError(
            "too-large",
            f"the header announces {image.width} x {image.height} pixels, more than the limit of {max_pixels:,}",
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey values of 16 bits, 32 bits or floats to 8 bits; Pillow's own conversion would clip them at 255."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    elif not np.isfinite(values).all():
        raise ImageError("damaged", "the image has values that are not finite")
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


def centre(image: Image.Image, size: int, max_pixels: int) -> Image.Image:
    """Resize the short side to `size` and crop the centre, with torchvision's rounding."""
    short, long = sorted(image.size)
    scaled = int(size * long / short)
    width, height = (size, scaled) if image.width <= image.height else (scaled, size)
    if width * height > max_pixels:
        # an extreme aspect ratio: resize only what the crop keeps, or it would not fit in memory
        left, top = (image.width - short) / 2, (image.height - short) / 2
        return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
