"""Write captions as text files alone, which are then the record of the run: what has one is skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.core.id_set import IdSet
from serve.core.inputs import DATASET, Item
from serve.outputs.jsonl import captions_of, explained
from vlv.common.command import say
from vlv.common.files import atomic_write
from vlv.data.image import ImageError


@dataclass(frozen=True)
class TextFiles:
    """Where the text files are: beside the images, or in `folder`, whose tree is that of the images below `base`."""

    extension: str = ".txt"
    folder: Path | None = None
    base: str = ""

    def of(self, item: Item) -> Path:
        """Return the text file of an image. Raises ImageError where it has no place."""
        if self.folder is None:
            if not item.is_file:
                raise ImageError(
                    "format", "an image in a shard or behind a URL has no place for a text file: give --output-dir"
                )
            return Path(item.path).with_suffix(self.extension)
        if "://" in item.path:
            inside = item.id.partition("://")[2].partition("?")[0]
        else:
            inside = os.path.relpath(item.key, self.base)
            inside = item.key if inside.startswith("..") else inside
        return (self.folder / inside.lstrip(os.sep)).with_suffix(self.extension)


def common_folder(paths: Sequence[str]) -> str:
    """Return the folder that holds everything that the arguments name."""
    local = [os.path.realpath(path) for path in paths if "://" not in path and not path.startswith(DATASET)]
    folders = [path if os.path.isdir(path) else os.path.dirname(path.partition("*")[0]) for path in local]
    return os.path.commonpath(folders) if folders else os.getcwd()


def lines(record: dict) -> str:
    """Return all captions of a record, one a line: a line break within a caption becomes a space."""
    return "\n".join(" ".join(caption.split()) for caption in captions_of(record)) + "\n"


class TextSink:
    """Write text files, and errors to stderr. A file that exists is skipped, or replaced with `overwrite`.

    Of images whose names differ in their ending only, the first of the input has the text file; the others are errors.
    """

    errors_path = journal_path = None
    changed = 0

    def __init__(self, files: TextFiles, overwrite: bool = False):
        self._files = files
        self._overwrite = overwrite
        self._taken = IdSet()  # text files of the images so far
        self._without: set[str] = set()  # keys of images whose text file is another's

    def is_finished(self, item: Item, size: int | None) -> bool:
        """Return True if an image, which comes once, has a text file."""
        try:
            text = self._files.of(item)
        except ImageError:  # raised again when it is captioned
            return False
        if not self._taken.add(str(text)):
            self._without.add(item.key)
            return False
        return not self._overwrite and text.exists()

    def caption(self, record: dict, item: Item) -> None:
        """Write the text file. Raises SinkError; ImageError if another image of the input has it."""
        text = self._files.of(item)
        if item.key in self._without:
            raise ImageError(
                "exists", f"{text} has the caption of another image, whose name differs in its ending only: rename one"
            )
        with explained(text):
            text.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(text) as file:
                file.write_text(lines(record), encoding="utf-8")

    def error(self, record: dict) -> None:
        """Write the record of an image that failed to stderr."""
        say(json.dumps(record))

    def missing(self, listed: IdSet) -> Iterator[str]:
        """Yield nothing: text files name no images."""
        return iter(())

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        return 0

    def close(self) -> None:
        """Nothing to close: every file is complete."""
