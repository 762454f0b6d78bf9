"""Read and repair files of JSON lines that a killed process may have left with half a line at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 16


def cut_torn_line(file: Path) -> int:
    """Remove what follows the last line break, the rest of an interrupted write; return the bytes removed.

    A missing file counts as empty. Reads the end of the file only.
    """
    if not file.exists():
        return 0
    with file.open("r+b") as stream:
        size = end = stream.seek(0, 2)
        while end:
            start = max(0, end - _BLOCK)
            stream.seek(start)
            if (found := stream.read(end - start).rfind(b"\n")) >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            stream.truncate(end)
    return size - end


def read_records(file: Path) -> Iterator[dict]:
    """Yield the records of a file's complete lines; an unfinished last line is left out. A missing file is empty.

    Raises ValueError with file and line number where a line is not JSON.
    """
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file}, line {number}: expected a JSON object, got {line[:60]!r}") from error
