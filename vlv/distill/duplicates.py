"""Identical and near-identical images, by hashes that a later run takes up again."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
from PIL import Image

BITS = 64


def content_hash(image: bytes) -> str:
    """Return the SHA-256 of an image file, as 16 hex digits."""
    return hashlib.sha256(image).hexdigest()[:16]


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits: is each pixel of a grey 9 x 8 miniature brighter than its left one? Survives recompression."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(small).astype(np.int16)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


class Duplicates:
    """Finds an earlier image with the same content, or whose difference hash differs in at most `near` bits.

    Hashes are filed under each of near + 1 slices of their bits: two that differ in at most `near` agree in one.
    Flat images (a hash of few bits, or nearly all) have similar hashes, so they are compared by content alone.
    """

    def __init__(self, near: int):
        self.near = near
        edges = [round(i * BITS / (near + 1)) for i in range(near + 2)]
        self._slices = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self._contents: dict[str, str] = {}
        self._filed: list[dict[int, list[tuple[int, str]]]] = [{} for _ in self._slices]

    def add(self, id: str, content: str, difference: int) -> None:
        self._contents.setdefault(content, id)
        if self._distinctive(difference):
            for (low, mask), filed in zip(self._slices, self._filed, strict=True):
                filed.setdefault(difference >> low & mask, []).append((difference, id))

    def find(self, content: str, difference: int) -> str | None:
        """Return the id of an earlier image that this one repeats, None without one."""
        if content in self._contents:
            return self._contents[content]
        if not self._distinctive(difference):
            return None
        for (low, mask), filed in zip(self._slices, self._filed, strict=True):
            for other, id in filed.get(difference >> low & mask, ()):
                if (difference ^ other).bit_count() <= self.near:
                    return id
        return None

    @staticmethod
    def _distinctive(difference: int) -> bool:
        return 4 <= difference.bit_count() <= BITS - 4
