"""Rows of training data: the records of tables, and what is read as an image, captions and licence."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vlv.data.remote import DataError, ServerError, not_found, open_file

# names of columns and fields; the first that is there counts
IMAGE, CAPTION = ("image", "jpg", "png", "webp"), ("caption", "text", "txt")
# what else a row may tell of its image, for vlv.train.distill
ABOUT = ("license", "url", "source", "author", "copyright", "pwatermark")
PATH = ("path", "file_name", "id")  # names an image in a table without its content
MAX_FIELD = 1 << 30  # bytes of a CSV file's field
WINDOW = 65_536  # rows shuffled together, unless a source asks for fewer


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: `image` is an image file's content, `about` its licence and so on where the data tell (ABOUT).

    `captions` are all of them where there are several, `caption` is the first; `problem` says why there is none.
    """

    id: str
    image: bytes
    caption: str | None = None
    about: dict = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    problem: str = ""


class Source(Protocol):
    """Shards of rows. `rows` has the number of each shard's rows; the shards and their order never change."""

    rows: list[int]
    window: int  # rows that may be shuffled together
    notes: list[str]  # what a user should know of the data, such as rows with several images

    def name(self, shard: int, row: int) -> str | None:
        """Return a row's id if it is known without reading the row."""
        ...

    def read(self, shard: int, row: int) -> Sample:
        """Return a row. Raises OSError or ValueError where it cannot be read."""
        ...

    def read_many(
        self, places: Sequence[tuple[int, int]], texts: bool = True, head: int | None = None
    ) -> list[Sample | Exception]:
        """Return rows, or why one cannot be read. Raises ServerError.

        Captions may be left out if not `texts`, images after their first `head` bytes.
        """
        ...

    def fingerprint(self) -> str:
        """Return what changes whenever a file of the data does."""
        ...


class Rows:
    """What sources have in common: `read` by `read_many` or the reverse."""

    rows: list[int]
    window = WINDOW
    notes: Sequence[str] = ()

    def name(self, shard: int, row: int) -> str | None:
        """Return a row's id if it is known without reading the row."""
        return None

    def read(self, shard: int, row: int) -> Sample:
        """Return a row. Raises OSError or ValueError where it cannot be read."""
        (sample,) = self.read_many([(shard, row)])
        if isinstance(sample, Exception):
            raise sample
        return sample

    def read_many(
        self, places: Sequence[tuple[int, int]], texts: bool = True, head: int | None = None
    ) -> list[Sample | Exception]:
        """Return rows, or why one cannot be read. Raises ServerError."""
        found: list[Sample | Exception] = []
        for shard, row in places:
            try:
                found.append(self.read(shard, row))
            except ServerError:
                raise
            except (OSError, ValueError) as error:
                found.append(error)
        return found


def described(texts: Iterable[tuple[str, bytes | Exception]]) -> dict:
    """Return a Sample's `caption`, `captions`, `about` and `problem` from the text files beside its image.

    `texts` are (name, content), of which the first that has a caption counts. A .txt file whose lines follow one
    another holds a caption a line, as serve.vllm_caption -n writes them; with empty lines between, paragraphs of one.
    """
    found: dict = {"caption": None, "captions": (), "about": {}, "problem": ""}
    for name, content in texts:
        if isinstance(content, Exception):
            found["problem"] = f"{name} cannot be read: {content}"
            continue
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            found["problem"] = f"{name} is not UTF-8"
            continue
        if name.endswith(".json"):
            try:
                values = json.loads(text)
            except ValueError:
                found["problem"] = f"{name} is not JSON"
                continue
            values = values if isinstance(values, dict) else {}
            found["about"] = about(values)
            captions = captions_of(values)
        else:
            lines = [line.strip() for line in text.splitlines()]
            captions = tuple(lines) if all(lines) else (text,)
        if found["caption"] is None and captions:
            found |= {"caption": captions[0], "captions": captions if len(captions) > 1 else ()}
    return found


def captions_of(values: dict) -> tuple:
    """Return the captions of a record or row: the list `captions` if it has several, else the first of CAPTION."""
    several = values.get("captions")
    if isinstance(several, list | tuple) and len(several) > 1 and all(isinstance(c, str) and c for c in several):
        return tuple(several)
    one = first_of(values, CAPTION)
    return () if one is None or one == "" else (one,)


def about(values: dict) -> dict:
    """Return what a record or row tells of its image."""
    return {name: values[name] for name in ABOUT if values.get(name) is not None}


def table_records(file: str) -> Iterator[tuple[int, dict]]:
    """Yield the line and the content of each record of a .jsonl or .csv file, local or remote.

    Raises DataError for a line that is no JSON object and for text that is not UTF-8, OSError.
    """
    try:
        opened = open_file(file)
    except FileNotFoundError as error:
        raise DataError(not_found(file, error)) from error
    with opened as stream:
        if file.lower().endswith(".csv"):
            csv.field_size_limit(MAX_FIELD)
            rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
            try:
                yield from ((rows.line_num, row) for row in rows)
            except (UnicodeDecodeError, csv.Error) as error:
                reason = error if isinstance(error, csv.Error) else "it is not UTF-8"
                raise DataError(
                    f"{file} cannot be read after line {rows.line_num} ({reason}): save it as UTF-8"
                ) from error
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    raise DataError(f"{file}, line {number}: expected a JSON object, got {line[:60]!r}")
                yield number, record


def first_of(values: dict, names: Sequence[str]):
    """Return the value of the first name that has one."""
    return next((values[n] for n in names if values.get(n) is not None), None)


def row_sample(values: dict, name: str, image_key: str | None = None) -> Sample:
    """Return a sample from a row with an image and maybe captions and an id.

    The image is a file's bytes, or {"bytes": …, "path": …}, whose path counts where it has no bytes, as in the
    `datasets` library. Raises OSError where that file cannot be read, ValueError for anything else.
    """
    image = first_of(values, (image_key,) if image_key else IMAGE)
    if isinstance(image, dict):
        path = image.get("path")
        image = Path(path).read_bytes() if image.get("bytes") is None and isinstance(path, str) else image.get("bytes")
    if not isinstance(image, bytes | None):
        raise ValueError(f"{name} holds a {type(image).__name__}, and an image file's content (bytes) is expected")
    captions = captions_of(values)
    return Sample(
        str(values.get("id") or name), image or b"", captions[0] if captions else None, about(values),
        captions if len(captions) > 1 else (),
    )  # fmt: skip


def check_image_key(found: Iterable[str], image_key: str | None, path: str) -> None:
    """Raise DataError where no column of a file holds images."""
    names, expected = set(found), {image_key} if image_key else set(IMAGE)
    if not names & expected:
        raise DataError(f"{path} has the columns {sorted(names)}, none of {', '.join(sorted(expected))}")


def identity(source: Source) -> str:
    """Return what tells a source from others wherever its files lie: the numbers of its rows and its first image."""
    first = source.read(next(shard for shard, rows in enumerate(source.rows) if rows), 0)
    digest = hashlib.sha256(f"{list(source.rows)}".encode())
    digest.update(hashlib.sha256(first.image).digest())
    return digest.hexdigest()[:16]
