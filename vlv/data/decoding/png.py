"""Read PNG files whose side data Pillow refuses, and the transparent colour of grey and 16-bit PNG files."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_PROFILE = 16 << 20  # bytes of a decompressed profile; larger ones are dropped
_KEPT = (b"tRNS", b"eXIf")  # ancillary chunks that change the pixels


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
    """Yield type, start, end and whether the checksum is right, of each complete chunk."""
    start = len(SIGNATURE)
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if end > len(content):
            return
        kind, checksum = content[start + 4 : start + 8], int.from_bytes(content[end - 4 : end], "big")
        yield kind, start, end, zlib.crc32(memoryview(content)[start + 4 : end - 4]) == checksum
        start = end


def without_side_data(content: bytes) -> tuple[bytes, bytes | None]:
    """Return the file without its text and other side data, damaged or not, and its ICC profile.

    Pillow refuses a file whose text or profile is larger than a mebibyte when decompressed, or whose side data has a
    wrong checksum. The pixels and their transparency and orientation stay. Critical chunks are left as they are.
    """
    parts, profile = [SIGNATURE], None
    end = len(SIGNATURE)
    for kind, start, end, intact in _chunks(content):
        critical = not kind[:1].islower()
        if critical or (intact and kind in _KEPT):
            parts.append(content[start:end])
        elif kind == b"iCCP" and intact:
            profile = _profile(content[start + 8 : end - 4])
    return b"".join([*parts, content[end:]]), profile


def _profile(data: bytes) -> bytes | None:
    """Return the decompressed profile of an iCCP chunk, None where it is damaged or too large."""
    reader = zlib.decompressobj()
    try:
        profile = reader.decompress(data[data.index(b"\0") + 2 :], _MAX_PROFILE)
    except (ValueError, zlib.error):
        return None
    return profile if reader.eof else None


def with_transparency(image: Image.Image, content: bytes) -> Image.Image:
    """Return a loaded PNG image with its transparent colour as an alpha channel where Pillow compares it wrongly.

    Pillow compares the colour of a tRNS chunk, in the file's units, with pixels of 8 bits; it is right for 1 and 8
    bits. The image is returned as it is where that applies, or where it has no such colour.
    """
    depth, kind = content[24], content[25]
    key = image.info.get("transparency")
    if kind == 0 and depth in (2, 4) and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif kind == 0 and depth == 16 and isinstance(key, int):
        values = np.asarray(image)
        grey = np.rint(values / 257).astype(np.uint8)
        return _with_alpha(image, [grey], values != key)
    elif kind == 2 and depth == 16 and isinstance(key, tuple):
        high, low = np.asarray(image).astype(np.uint16), np.asarray(_low_bytes(content))
        opaque = (high << 8 | low) != np.array(key, np.uint16)
        return _with_alpha(image, list(np.moveaxis(np.asarray(image), -1, 0)), opaque.any(-1))
    return image


def _with_alpha(image: Image.Image, channels: list[np.ndarray], opaque: np.ndarray) -> Image.Image:
    """Return an LA or RGBA image of 8-bit channels [H, W] and a mask, with the metadata of `image`."""
    stacked = np.stack([*channels, np.where(opaque, 255, 0).astype(np.uint8)], -1)
    made = Image.fromarray(stacked)
    made.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return made


def _low_bytes(content: bytes) -> Image.Image:
    """Decode the low bytes of the samples of a 16-bit RGB file, as mode RGB."""
    image = PngImagePlugin.PngImageFile(io.BytesIO(content))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # of big-endian data these are the low bytes
    image.load()
    return image
