"""The output folder of serve.ray_batch: its plan, and the parts that tell which units of the plan are done.

    _plan/000000.json ...    the images of each unit, written before anything is captioned
    _plan/complete.json      the plan's terms; without it the plan is made again
    part-000000.parquet      a unit's captions, written atomically: the unit is done when it exists
    errors/part-000000.parquet    a unit's images that failed, written before its captions

A unit that is done twice, because a worker died between its part and its report, writes the same file again. So
nothing is lost or doubled, whatever is killed, on a local disk as on S3 or GCS (through fsspec).
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from fsspec.core import url_to_fs
from pyarrow import parquet

from serve.core.inputs import SHARDS, Item, LeftOut, Members, SourceError, expand, read_members
from serve.outputs.jsonl import IdSet
from vlv.common.command import Misuse, one_line
from vlv.common.files import atomic_write
from vlv.data.image import ImageError
from vlv.data.image_files import is_image

HEADERS = 1 << 16  # bytes that are fetched at a time while a shard is listed


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
            raise ImageError("unreadable", f"cannot read the URL: {type(error).__name__}: {error}") from error
        if self.length is not None and len(content) > self.length:  # a server without ranges sends the whole file
            content = content[self.offset : end]
        if self.length is not None and len(content) < self.length:
            raise ImageError("damaged", f"the shard ends after {len(content)} of {self.length} bytes of this member")
        return content


class Store:
    """A folder, local or behind a URL, whose files are written atomically."""

    def __init__(self, url: str):
        """Raises Misuse if fsspec has no file system for the URL."""
        self._fs, self._root = file_system(url)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        path = f"{self._root}/{name}"
        if "file" in self._fs.protocol:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with atomic_write(Path(path), shared=True) as file:
                file.write_bytes(content)
        else:  # an object store shows an object once it is complete
            self._fs.pipe_file(path, content)

    def remove(self, name: str) -> None:
        """Remove a file if there is one."""
        path = f"{self._root}/{name}"
        if self._fs.exists(path):
            self._fs.rm_file(path)

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError."""
        return self._fs.cat_file(f"{self._root}/{name}")

    def names(self, suffix: str) -> set[str]:
        """Return the names at the top of the folder that end with `suffix`."""
        if not self._fs.exists(self._root):
            return set()
        self._fs.invalidate_cache()
        found = {path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
        return {name for name in found if name.endswith(suffix)}


def file_system(url: str):
    """Return fsspec's file system for a URL or path, and the path in it. Raises Misuse."""
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Misuse(f"{url} cannot be opened: {error}") from error
    return fs, path.rstrip("/")


def part(unit: int, ending: str = "") -> str:
    """Return the name of a unit's part."""
    return f"part-{unit:06}{ending}"


def items_of(paths: list[str], column: str, left_out: LeftOut | None = None) -> Iterator[Item]:
    """Yield the images of paths (as serve.core.inputs), of folders, globs and shards behind URLs, and of Parquet files
    of URLs. Raises SourceError or Misuse.
    """
    left_out = left_out or LeftOut()
    for path in paths:
        if path.endswith(".parquet"):
            yield from _listed(path, column)
        elif "://" in path:
            yield from _remote(path, left_out)
        else:
            yield from expand([path], left_out)


def _listed(path: str, column: str) -> Iterator[Item]:
    fs, inside = file_system(path)
    if not fs.exists(inside):
        raise SourceError(f"no such file: {path}")
    with fs.open(inside, "rb") as file:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise SourceError(f"{path} has no column {column}: it has {table.schema_arrow.names}; choose --url-column")
        for batch in table.iter_batches(columns=[column]):
            for url in batch.column(0).to_pylist():
                if "://" in (url or ""):
                    yield Remote(url, url)
                else:
                    yield Item(url or "", os.path.abspath(url or ""))


def _remote(url: str, left_out: LeftOut) -> Iterator[Item]:
    fs, inside = file_system(url)
    names = sorted(fs.glob(inside) if glob.has_magic(inside) else fs.find(inside))
    if not any(is_image(name) or name.lower().endswith(SHARDS) for name in names):
        raise SourceError(f"no images at {url}")
    for name in names:
        member_url = fs.unstrip_protocol(name)
        if name.lower().endswith(SHARDS):
            yield from _remote_shard(fs, name, member_url, left_out)
        elif is_image(name):
            yield Remote(member_url, member_url)
        else:
            left_out.file(name)


def _remote_shard(fs, name: str, url: str, left_out: LeftOut) -> Iterator[Item]:
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


def plan(store: Store, items: Iterable[Item], terms: dict, size: int) -> int:
    """Write the plan unless it is there; return the number of units. Raises Misuse if it has other terms."""
    try:
        held = json.loads(store.read("_plan/complete.json"))
    except FileNotFoundError:
        pass
    else:
        # a plan of an earlier version has no flags
        if changed := sorted(name for name in terms if held.get(name, terms[name]) != terms[name]):
            name, before = changed[0], held.get(changed[0])
            raise Misuse(f"DST was begun with {name} {before}, and this is {terms[name]}: choose another DST")
        return held["units"]
    units, batch = 0, []
    for item in _once(items):
        batch.append(item)
        if len(batch) == size:
            _write_unit(store, units, batch)
            units, batch = units + 1, []
    if batch:
        _write_unit(store, units, batch)
        units += 1
    store.write("_plan/complete.json", json.dumps({**terms, "units": units}).encode())
    return units


def _once(items: Iterable[Item]) -> Iterator[Item]:
    """Return the items without those whose id has come before."""
    seen = IdSet()
    return (item for item in items if seen.add(item.id))


def _write_unit(store: Store, unit: int, items: list[Item]) -> None:
    entries = [asdict(item) | {"remote": isinstance(item, Remote)} for item in items]
    store.write(f"_plan/{unit:06}.json", json.dumps(entries).encode())


def unit_items(store: Store, unit: int) -> list[Item]:
    """Return the images of one unit."""
    entries = json.loads(store.read(f"_plan/{unit:06}.json"))
    return [(Remote if entry.pop("remote") else Item)(**entry) for entry in entries]
