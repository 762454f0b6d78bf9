"""Tell a JPEG file that only lacks its end marker from a truncated one, and complete either."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import JpegImagePlugin

START, _END, _SCAN = b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda"  # of the file, of the file, of pixels
_SEQUENTIAL = (0xC0, 0xC1)  # frames that are coded in one pass
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # what ends a scan
_FILLER = b"\xa5\x5a\x33\xcc" * 64


def with_end_marker(content: bytes) -> bytes | None:
    """Return the file with its end marker, None unless all its pixels are there.

    The decoder fills what is missing in silence, so the file is decoded twice, with nothing and with other data before
    the marker: pixels that depend on that data were missing. Only sequential files are completed, since later passes
    of a progressive file may be missing without a trace.
    """
    if not _is_sequential(content):
        return None
    completed = content + _END
    try:
        same = np.array_equal(_decode(completed), _decode(content + _FILLER + _END))
    except (OSError, SyntaxError, ValueError):
        return None
    return completed if same else None


def intact_part(content: bytes) -> bytes:
    """Return a JPEG file that ends within its pixels with an end marker, and any other file as it is.

    Decoders then keep the pixels that are there, and fill the rest with grey. What follows the last scan, such as the
    beginning of a table, is left out.
    """
    scan = content.rfind(_SCAN) if content.startswith(START) else -1
    if scan <= content.rfind(_END):
        return content
    start = scan + 2 + int.from_bytes(content[scan + 2 : scan + 4], "big")
    if start >= len(content):  # within the header of the scan: the one before is the last
        return content[:scan] + _END
    after = _MARKER.search(content, start)
    return content[: after.start() if after else len(content)].removesuffix(b"\xff") + _END


def _decode(content: bytes) -> np.ndarray:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))
    image.load()
    return np.asarray(image)


def _is_sequential(content: bytes) -> bool:
    """Return True if the first frame is coded in one pass, with all its components in one scan."""
    position, components = 2, 0
    while position + 9 < len(content) and content[position] == 0xFF:
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _SEQUENTIAL:
                return False
            components = content[position + 9]
        elif marker == 0xDA:
            return content[position + 4] == components
        position += 2 + length
    return False
