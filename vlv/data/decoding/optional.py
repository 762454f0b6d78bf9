"""Read HEIC and JPEG XL with optional packages, which are imported when the first such file is opened.

pillow-heif (libheif) and pillow-jxl-plugin (libjxl) turn images upright as the container or the codestream says, which
is what counts in both formats; the orientation in EXIF data is a copy of it, or wrong, and is dropped here.
"""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image

_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AV1_BRANDS = {b"avif", b"avis"}
_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height
_MAX_SIZE_HEADER = 11  # bytes of a JPEG XL codestream: the start, and at most 68 bits


@dataclass(frozen=True)
class OptionalFormat:
    """A format that is read if its package is installed."""

    name: str
    module: str
    package: str
    extensions: tuple[str, ...]

    @property
    def installed(self) -> bool:
        """Return True if the package is installed; nothing is imported for it."""
        return find_spec(self.module) is not None

    @property
    def install(self) -> str:
        """Return the command that installs the package."""
        return f"pip install {self.package}"


HEIF = OptionalFormat("HEIF", "pillow_heif", "pillow-heif", (".heic", ".heif", ".hif"))
JXL = OptionalFormat("JXL", "pillow_jxl", "pillow-jxl-plugin", (".jxl",))
OPTIONAL_FORMATS = (HEIF, JXL)


class OptionalFormatError(ValueError):
    """Raised for a file that cannot be opened, or whose package is not installed; `kind` is that of ImageError."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def optional_format(content: bytes) -> OptionalFormat | None:
    """Return the format of a file's content if it is HEIC or JPEG XL, by its first bytes."""
    if content.startswith((_JXL_CODESTREAM, _JXL_CONTAINER)):
        return JXL
    if content[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(content[:4], "big"), 256)
    brands = {content[8:12], *(content[at : at + 4] for at in range(16, end, 4))}
    generic = content[8:12] in (b"mif1", b"msf1") and not brands & _AV1_BRANDS
    return HEIF if brands & _HEVC_BRANDS or generic else None


def missing_package(extension: str) -> str:
    """Return the command that installs what reads files of this extension (lower case), "" if nothing is missing."""
    found = (one for one in OPTIONAL_FORMATS if extension in one.extensions and not one.installed)
    return next((one.install for one in found), "")


def open_heif(content: bytes) -> Image.Image:
    """Open a HEIC file; its pixels are decoded when it is loaded. Raises OptionalFormatError."""
    package = _import(HEIF)
    package.options.DECODE_THREADS = 1  # images are decoded in several processes
    try:
        image = package.HeifImageFile(io.BytesIO(content))
    except (OSError, SyntaxError, ValueError) as error:
        raise OptionalFormatError("damaged", f"the header is damaged: {' '.join(str(error).split())}") from error
    return _without_orientation(image)


def open_jxl(content: bytes) -> Image.Image:
    """Decode a JPEG XL file; `jxl_size` gives its size before. Raises OptionalFormatError."""
    _import(JXL)
    plugin = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
    plugin.DECODE_THREADS = 0
    try:
        image = plugin.JXLImageFile(io.BytesIO(content))
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:  # libjxl does not say what is wrong
        raise OptionalFormatError("damaged", "the JXL data is damaged or truncated") from error
    # a recompressed JPEG file comes back as it was, with pixels that are not turned and its EXIF data
    return image if image.jpeg else _without_orientation(image)


def jxl_size(content: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG XL file, before its orientation is applied. Raises OptionalFormatError.

    Source: the size header of ISO/IEC 18181-1 (fields from the lowest bit on), the boxes of 18181-2.
    """
    head = _jxl_codestream(content)[:_MAX_SIZE_HEADER]
    if not head.startswith(_JXL_CODESTREAM):
        raise OptionalFormatError("damaged", "the header is damaged: it has no JPEG XL codestream")
    bits, left = int.from_bytes(head[2:], "little"), 8 * len(head) - 16

    def take(count: int) -> int:
        nonlocal bits, left
        if left < count:
            raise OptionalFormatError("damaged", "the header is truncated")
        value, bits, left = bits & ((1 << count) - 1), bits >> count, left - count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    if ratio == 0:
        return side(), height
    wide, high = _JXL_RATIOS[ratio - 1]
    return height * wide // high, height


def _jxl_codestream(content: bytes) -> bytes:
    """Return the codestream's first bytes, at least as many as its size takes if the file has them."""
    if not content.startswith(_JXL_CONTAINER):
        return content
    start, found = 0, b""
    while start + 8 <= len(content) and len(found) < _MAX_SIZE_HEADER:
        length, kind, header = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8], 8
        if length == 1:
            length, header = int.from_bytes(content[start + 8 : start + 16], "big"), 16
        end = start + length if length else len(content)  # 0: to the file's end
        if end < start + header:
            break
        if kind in (b"jxlc", b"jxlp"):
            data = start + header + (4 if kind == b"jxlp" else 0)  # a part begins with its number
            found += content[data : min(end, data + _MAX_SIZE_HEADER)]
        if kind == b"jxlc":
            break
        start = end
    return found


def _import(wanted: OptionalFormat):
    try:
        return importlib.import_module(wanted.module)
    except ImportError as error:
        if not wanted.installed:
            message = f"{wanted.name} files need a package that is not installed: {wanted.install}"
        else:
            message = f"{wanted.name} files need {wanted.package}, which cannot be imported: {error}"
        raise OptionalFormatError("format", message) from error


def _without_orientation(image: Image.Image) -> Image.Image:
    for name in ("exif", "xmp"):
        image.info.pop(name, None)
    return image
