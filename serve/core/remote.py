"""List images behind URLs, and those named in tables: what serve.core.inputs leaves to packages for them.

    items = items_of(["photos/", "s3://bucket/shards/{00000..00099}.tar", "list.parquet", "https://host/a.jpg"])

URLs are opened by fsspec: http(s), and with its packages s3, gs, hf. A shard is listed by its headers, and its images
are fetched by their ranges. Tables are .parquet, .jsonl and .csv files with a column of URLs or paths.
"""

from __future__ import annotations

import csv
import functools
import glob
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from serve.core.inputs import SHARDS, Item, LeftOut, Members, SourceError, expand, named_items, read_members
from vlv.common.command import Misuse, one_line
from vlv.data.image import ImageError
from vlv.data.image_files import is_image

HEADERS = 1 << 16  # bytes that are fetched at a time while a shard is listed
COLUMNS = ("url", "path", "file_name", "image", "id")  # the first that a table has holds the images


class Remote(Item):
    """An image behind a URL that fsspec opens: the object, or a member of the shard that it is."""

    __slots__ = ()

    def read(self) -> bytes:
        """Return the image file's content. Raises ImageError."""
        if self.problem:
            raise ImageError("unreadable", self.problem)
        end = None if self.length is None else self.offset + self.length
        try:
            fs, path = file_system(self.path)
            content = fs.cat_file(path, start=self.offset or None, end=end)
        except FileNotFoundError as error:
            raise ImageError("missing", "there is no such file") from error
        except Exception as error:  # every file system has its own
            raise ImageError("unreadable", f"cannot read the URL: {one_line(error)}") from error
        if self.length is not None and len(content) > self.length:  # a server without ranges sends the full file
            content = content[self.offset : end]
        if self.length is not None and len(content) < self.length:
            raise ImageError("damaged", f"the shard ends after {len(content)} of {self.length} bytes of this member")
        return content


def file_system(url: str):
    """Return fsspec's file system for a URL or path, and the path in it. Raises Misuse."""
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Misuse(f"{url} cannot be opened: {error}") from error
    return fs, path.rstrip("/")


def items_of(paths: Sequence[str], column: str | None = None, left_out: LeftOut | None = None) -> Iterator[Item]:
    """Yield the images of paths as serve.core.inputs.expand does, and of URLs and tables.

    `column`: of tables, that with the images; None: the first of COLUMNS. Raises SourceError or Misuse.
    """
    return expand(paths, left_out, functools.partial(_open, column=column))


def _open(path: str, left_out: LeftOut, listed: bool, column: str | None) -> Iterator[Item]:
    """Yield the images of a URL or a table; a URL that a list names is an image, if it is no shard."""
    inside = urlsplit(path).path.lower()
    if not listed and inside.endswith((".parquet", ".jsonl", ".csv")):
        read = _parquet if inside.endswith(".parquet") else _lines if inside.endswith(".jsonl") else _csv
        fs, file = file_system(path)
        if not fs.exists(file):
            raise SourceError(f"no such file: {path}")
        with fs.open(file, "rb") as stream:
            yield from named_items(read(path, stream, column), path, left_out, functools.partial(_open, column=column))
        return
    fs, name = file_system(path)
    if inside.endswith(SHARDS) and not glob.has_magic(name):
        yield from _shard(fs, name, path, left_out)
    elif listed or (path.startswith(("http://", "https://")) and not path.endswith("/")):  # its end may say nothing
        yield Remote(path, path)
    else:
        yield from _folder(fs, name, path, left_out)


def _folder(fs, folder: str, url: str, left_out: LeftOut) -> Iterator[Item]:
    names = sorted(fs.glob(folder) if glob.has_magic(folder) else fs.find(folder))
    if not any(is_image(name) or name.lower().endswith(SHARDS) for name in names):
        raise SourceError(f"no images at {url}")
    for name in names:
        full = fs.unstrip_protocol(name)
        if name.lower().endswith(SHARDS):
            yield from _shard(fs, name, full, left_out)
        elif is_image(name):
            yield Remote(full, full)
        else:
            left_out.file(name)


def _shard(fs, name: str, url: str, left_out: LeftOut) -> Iterator[Item]:
    members: Members = {}
    problem = None
    try:
        # a header is half a kilobyte and images lie between: read little ahead
        with fs.open(name, "rb", block_size=HEADERS) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            read_members(shard, members, left_out, url)
    except Exception as error:  # tarfile's, and every file system has its own
        problem = f"the shard cannot be read to its end: {one_line(error)}"
    for member, (offset, size) in members.items():
        yield Remote(f"{url}/{member}", url, offset, size)
    if problem:
        yield Remote(url, url, problem=problem)


def _column(path: str, names: Sequence[str], column: str | None) -> str:
    found = next((name for name in ([column] if column else COLUMNS) if name in names), None)
    if found is None:
        expected = f"column {column}" if column else f"column {', '.join(COLUMNS)}"
        raise SourceError(f"{path} has no {expected}: it has {list(names)}; choose --url-column")
    return found


def _parquet(path: str, stream, column: str | None) -> Iterator[str]:
    from pyarrow import parquet  # an optional package

    table = parquet.ParquetFile(stream)
    name = _column(path, table.schema_arrow.names, column)
    for batch in table.iter_batches(columns=[name]):
        yield from (str(value or "") for value in batch.column(0).to_pylist())


def _lines(path: str, stream, column: str | None) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                record = json.loads(line)
                yield str(record[_column(f"line {number} of {path}", list(record), column)])
            except (ValueError, TypeError, AttributeError) as error:
                if isinstance(error, SourceError):
                    raise
                raise SourceError(f"line {number} of {path} is no JSON object") from error


def _csv(path: str, stream, column: str | None) -> Iterator[str]:
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
    name = _column(path, rows.fieldnames or [], column)
    yield from (row[name] or "" for row in rows)
