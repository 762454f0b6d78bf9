"""Find image files in folders, and the files that a numbered pattern stands for."""

from __future__ import annotations

import os
import re
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


def numbered_paths(path: str) -> list[str]:
    """Return the paths of a pattern such as shard-{00000..00099}.tar; another path, as {9..0}.tar, as it is."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None or int(match[1]) > int(match[2]) or os.path.lexists(path):
        return [path]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{path[: match.start()]}{number:0{len(first)}}{path[match.end() :]}" for number in numbers]
