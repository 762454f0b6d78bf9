"""Find image files in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vlv.data.image import EXTENSIONS


def is_image(name: str | Path) -> bool:
    """Return True if the name ends like an image file."""
    return os.path.splitext(os.fspath(name))[1].lower() in EXTENSIONS


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files of `paths`, in their order; of a folder all image files below it, sorted by path."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(file for file in path.rglob("*") if is_image(file)) if path.is_dir() else [path]
    return found
