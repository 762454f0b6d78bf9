"""Restore the brightest samples of JPEG 2000 files of more than 8 bits, which Pillow turns black."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, Jpeg2KImagePlugin

_START = b"\xff\x4f\xff\x51"  # of a codestream: its first two markers, SOC and SIZ
_COUNT, _DEPTHS = 40, 42  # bytes from the start to the number of components, and to their depths, 3 bytes each
_SIGNED = 0x80  # bit of a depth; the lower ones are the bits of a sample less one
_MIDDLE = 128  # level of the second decoding, see below


def with_highlights(image: Image.Image, content: bytes) -> Image.Image:
    """Return a loaded JPEG 2000 image with the samples that Pillow has wrapped from 256 to 0 at 255.

    Pillow rounds samples of several components to 8 bits, and the highest half level becomes 256, of which it keeps the
    lower 8 bits. These samples are told from black ones by a second decoding, as if they had one bit more: a level
    v then becomes v / 2 + 64.
    """
    start = _codestream(content)
    count = int.from_bytes(content[start + _COUNT : start + _DEPTHS], "big")
    places = range(start + _DEPTHS, start + _DEPTHS + 3 * count, 3)
    if start < 0 or count < 2 or all((content[place] & ~_SIGNED) < 8 for place in places):
        return image
    deeper = bytearray(content)
    for place in places:
        deeper[place] += 1
    second = Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(deeper))
    second.load()
    levels = np.array(image)
    levels[(levels == 0) & (np.asarray(second) >= _MIDDLE)] = 255
    restored = Image.frombytes(image.mode, image.size, levels.tobytes())
    restored.info = image.info
    return restored


def _codestream(content: bytes) -> int:
    """Return where the codestream starts, -1 if there is none. Source: the boxes of ISO/IEC 15444-1, annex I."""
    start = 0
    while not content.startswith(_START, start):
        length, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        if kind == b"jp2c":
            start += 16 if length == 1 else 8
            return start if content.startswith(_START, start) else -1
        if length == 1:
            length = int.from_bytes(content[start + 8 : start + 16], "big")
        if length < 8 or start + length >= len(content):
            return -1
        start += length
    return start
