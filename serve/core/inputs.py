"""List the images of files, folders, globs, lists and tar shards, as a lazy stream of items.

Memory does not grow with the number of images: only the listing of the folder that is being read is held. The order is
that of the arguments, sorted by name within a folder.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlv.common.command import Misuse, why
from vlv.data.image import EXTENSIONS, ImageError
from vlv.data.image_files import is_image

LISTS, SHARDS, COMPRESSED = (".txt",), (".tar",), (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


class SourceError(Misuse):
    """Raised for an argument that leads to no images; the message says which one and why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image, or (with `problem`) a source whose images cannot be listed.

    `id` is the path as the arguments give it, for a member of a tar shard `shard.tar/member`.
    `path` is the file that holds the bytes: all of it, or `length` bytes from `offset`.
    """

    id: str
    path: str
    offset: int = 0
    length: int | None = None
    problem: str | None = None

    def __reduce__(self):  # every image is pickled once, and the dataclass's own method is several times slower
        return type(self), (self.id, self.path, self.offset, self.length, self.problem)

    def read(self) -> bytes:
        """Return the image file's content. Raises ImageError."""
        if self.problem:
            raise ImageError("unreadable", self.problem)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(-1 if self.length is None else self.length)
        except FileNotFoundError as error:
            raise ImageError("missing", "there is no such file") from error
        except OSError as error:
            raise ImageError("unreadable", f"cannot read the file: {why(error)}") from error
        if self.length is not None and len(content) < self.length:
            raise ImageError("damaged", f"the shard ends after {len(content)} of {self.length} bytes of this member")
        return content


def expand(paths: Sequence[str]) -> Iterator[Item]:
    """Yield the images of files, folders (recursive), globs, .txt lists of paths and .tar shards, in order.

    Hidden files and folders are left out of folders and globs. Raises SourceError at once if a path does not exist or
    all of them together hold no image.
    """
    for path in paths:
        if not os.path.lexists(path) and not glob.has_magic(path):
            raise SourceError(f"no such file or folder: {path}")
        if path.lower().endswith(COMPRESSED):
            raise SourceError(f"{path} is a compressed shard, whose members cannot be read at random: decompress it")
    items = itertools.chain.from_iterable(_argument(os.path.normpath(p)) for p in paths)
    first = next(items, None)
    if first is None:
        kinds = " ".join(sorted(EXTENSIONS))
        raise SourceError(f"no images in {', '.join(paths)}: looked for {kinds} and .tar shards")
    return itertools.chain([first], items)


def part_of(items: Iterator[Item], part: int, parts: int) -> Iterator[Item]:
    """Return the items of one of `parts` workers (`part` from 1), by their ids: new files move no others."""
    return (item for item in items if zlib.crc32(os.fsencode(item.id)) % parts == part - 1)


def _argument(path: str) -> Iterator[Item]:
    if not os.path.lexists(path) and glob.has_magic(path):
        return itertools.chain.from_iterable(_entry(p, named=False) for p in _glob(path))
    if path.lower().endswith(LISTS) and not os.path.isdir(path):
        return _list(path)
    return _entry(path, named=True)


def _entry(path: str, named: bool) -> Iterator[Item]:
    """Yield the items of a folder, shard or file; a file that is not `named` needs the extension of an image."""
    if os.path.isdir(path):
        yield from _folder(path)
    elif path.lower().endswith(SHARDS):
        yield from _shard(path)
    elif named or is_image(path):
        yield Item(path, os.path.abspath(path))


def _folder(path: str, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[Item]:
    """Yield a folder's images and shards, recursively; a link that leads back to a parent is not followed."""
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            names = sorted(filter(None, map(_name, entries)))
    except OSError as error:
        yield Item(path, os.path.abspath(path), problem=f"cannot list the folder: {why(error)}")
        return
    here = (status.st_dev, status.st_ino)
    if here in parents:
        return
    for name in names:
        inside = name if path == os.curdir else os.path.join(path, name)
        if name.endswith(os.sep):
            yield from _folder(inside.rstrip(os.sep), (*parents, here))
        elif name.lower().endswith(SHARDS):
            yield from _shard(inside)
        else:
            yield Item(inside, os.path.abspath(inside))


def _name(entry: os.DirEntry) -> str | None:
    """Return the name of an image, shard or folder (with a slash), else None: the names are all that is held."""
    name = entry.name
    try:
        if name.startswith("."):
            return None
        if entry.is_dir():
            return name + os.sep
        return name if entry.is_file() and (is_image(name) or name.lower().endswith(SHARDS)) else None
    except OSError:
        return None


def _glob(pattern: str) -> Iterator[str]:
    """Yield the paths that match, sorted folder by folder; `**` matches any depth, also none."""
    root = os.sep if pattern.startswith(os.sep) else ""
    return _match(root, [p for p in pattern.split(os.sep) if p])


def _match(base: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        path = os.path.join(base, part)
        if os.path.lexists(path):
            yield from _match(path, rest)
        return
    if part == "**":
        yield from _match(base, rest or ["*"])
    try:
        with os.scandir(base or ".") as entries:
            names = sorted(e.name for e in entries if fnmatch.fnmatchcase(e.name, part) and not e.name.startswith("."))
    except OSError:
        return
    for name in names:
        path = os.path.join(base, name)
        if part != "**":
            yield from _match(path, rest)
        elif os.path.isdir(path) and not os.path.islink(path):
            yield from _match(path, parts)


def _list(path: str) -> Iterator[Item]:
    """Yield the files named in a text file, one a line; relative ones from the current folder, as arguments are."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if name := line.rstrip("\r\n"):
                    # not checked here: a list may be long and its disk slow; a missing file is an error of its own
                    name = os.path.normpath(name)
                    yield from _shard(name) if name.lower().endswith(SHARDS) else [Item(name, os.path.abspath(name))]
    except OSError as error:
        raise SourceError(f"cannot read the list {path}: {why(error)}") from error


def _shard(path: str) -> Iterator[Item]:
    """Yield the images of a tar shard (WebDataset); only headers are read here."""
    where = os.path.abspath(path)
    try:
        with tarfile.open(path, "r:") as shard:
            for member in image_members(shard):
                yield Item(f"{path}/{member.name}", where, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        yield Item(path, where, problem=f"the shard cannot be read to its end: {error}")


def image_members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members whose names are those of images; only headers are read. Raises OSError, tarfile.TarError."""
    while (member := shard.next()) is not None:
        shard.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would remember every header
        hidden = os.path.basename(member.name).startswith(".")
        if member.isreg() and not member.issparse() and not hidden and is_image(member.name):
            yield member
