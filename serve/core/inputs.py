"""List the images of files, folders, globs, lists and tar shards, as a lazy stream of items.

Memory does not grow with the number of images: only the listing of the folder or shard that is being read is held.
The order is that of the arguments, sorted by name within a folder.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import itertools
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vlv.common.command import Misuse, why
from vlv.data.decoding.optional import missing_package
from vlv.data.image import EXTENSIONS, ImageError
from vlv.data.image_files import is_image

LISTS = (".txt",)
TABLES = (".parquet", ".jsonl", ".csv")
SHARDS = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
# endings of images that are not read, some of them only without an optional package
UNREAD_IMAGES = frozenset(
    ".heic .heif .hif .jxl .tga .psd .svg .eps .ico .icns .jxr .wdp .exr .hdr .dds .xcf .pcx .qoi .jpf .jpx .jpm .mj2"
    " .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw".split()
)
SHOWN = 5  # names in a message
# opens a URL or table; True if a list names it, which is not checked then
Opener = Callable[[str, "LeftOut", bool], Iterator["Item"]]
Members = dict[str, tuple[int, int]]  # by name: offset and size of the content


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

    @property
    def key(self) -> str:
        """Return what identifies the image, however the arguments spell its path."""
        return key_of(self.id, self.path)

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


def key_of(image_id: str, path: str | None) -> str:
    """Return what identifies an image: its path, with the folder's links resolved, and its name within a shard."""
    if not path or "://" in path:
        return image_id
    folder, name = os.path.split(path)
    key = os.path.join(_real_folder(folder), name)
    member = image_id.find(f"{name}/")
    return key if os.path.basename(image_id) == name or member < 0 else key + image_id[member + len(name) :]


@functools.lru_cache(1 << 12)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def stamp_of(path: str) -> tuple[int, int] | None:
    """Return size and time (ns) of the last change of a file, None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


@dataclass
class LeftOut:
    """Count the files that a listing leaves out, by kind."""

    images: Counter[str] = field(default_factory=Counter)  # that should have been captioned
    others: Counter[str] = field(default_factory=Counter)  # that are no images, by extension
    replaced: list[str] = field(default_factory=list)  # members of shards, replaced by later ones of the same name

    def file(self, name: str) -> None:
        """Count a file by its extension."""
        extension = os.path.splitext(name)[1].lower()
        if extension in UNREAD_IMAGES - EXTENSIONS:
            self.images[extension] += 1
        else:
            self.others[extension or "no extension"] += 1

    def __str__(self) -> str:
        """Return one line, empty if nothing was left out."""
        parts = []
        for kind, count in self.images.most_common():
            install = missing_package(kind)
            parts.append(f"{count:,} {kind}" + (f" ({install})" if install else ""))
        if self.replaced:
            more = ", ..." if len(self.replaced) > SHOWN else ""
            names = ", ".join(self.replaced[:SHOWN]) + more
            parts.append(f"{len(self.replaced):,} members of shards with a later one of the same name ({names})")
        if self.others:
            kinds = [kind for kind, _ in self.others.most_common()]
            more = ", ..." if len(kinds) > SHOWN else ""
            parts.append(f"{self.others.total():,} other files ({', '.join(kinds[:SHOWN])}{more})")
        return f"left out: {'; '.join(parts)}" if parts else ""


def expand(paths: Sequence[str], left_out: LeftOut | None = None, other: Opener | None = None) -> Iterator[Item]:
    """Yield the images of files, folders (recursive), globs, .txt lists of paths and .tar shards, in order.

    A path with {00000..00099} stands for the paths with these numbers. Hidden files and folders are left out of
    folders and globs; `left_out` counts what else is. A .txt file with an image of the same name beside it is that
    image's caption, not a list. `other` opens URLs and tables. Raises SourceError at once if a path does not exist or
    all of them together hold no image.
    """
    paths = [one for path in paths for one in _numbered(path)]
    for path in paths:
        if other and _is_other(path):
            continue
        if not os.path.lexists(path) and not glob.has_magic(path):
            raise SourceError(f"no such file or folder: {path}")
        if path.lower().endswith(COMPRESSED):
            raise SourceError(f"{path} is a compressed shard, whose members cannot be read at random: decompress it")
    counts = left_out or LeftOut()
    items = itertools.chain.from_iterable(_argument(path, counts, other) for path in paths)
    first = next(items, None)
    if first is None:
        kinds = " ".join(sorted(EXTENSIONS))
        about = f" ({counts})" if str(counts) else ""
        raise SourceError(f"no images in {', '.join(paths)}: looked for {kinds} and .tar shards{about}")
    return itertools.chain([first], items)


def part_of(items: Iterator[Item], part: int, parts: int) -> Iterator[Item]:
    """Return the items of one of `parts` workers (`part` from 1), by their ids: new files move no others."""
    return (item for item in items if zlib.crc32(os.fsencode(item.id)) % parts == part - 1)


def _numbered(path: str) -> list[str]:
    """Return the paths of a pattern such as shard-{00000..00099}.tar; another path as it is."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None or os.path.lexists(path):
        return [path]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{path[: match.start()]}{number:0{len(first)}}{path[match.end() :]}" for number in numbers]


def _is_other(path: str) -> bool:
    """Return True for a URL or a table, which serve.core.remote opens."""
    return "://" in path or path.lower().endswith(TABLES)


def _argument(path: str, left_out: LeftOut, other: Opener | None) -> Iterator[Item]:
    if other and _is_other(path):
        return other(path, left_out, False)
    path = os.path.normpath(path)
    if not os.path.lexists(path) and glob.has_magic(path):
        return itertools.chain.from_iterable(_entry(p, False, left_out) for p in _glob(path))
    if path.lower().endswith(LISTS) and not os.path.isdir(path):
        if _is_caption(path):
            left_out.file(path)
            return iter(())
        return _list(path, left_out, other)
    return _entry(path, True, left_out)


def _is_caption(path: str) -> bool:
    """Return True if an image of the same name is beside a text file, as after a run with --format txt."""
    stem = os.path.splitext(path)[0]
    return any(os.path.exists(stem + extension) for extension in (*EXTENSIONS, *map(str.upper, EXTENSIONS)))


def _entry(path: str, named: bool, left_out: LeftOut) -> Iterator[Item]:
    """Yield the items of a folder, shard or file; a file that is not `named` needs the extension of an image."""
    if os.path.isdir(path):
        yield from _folder(path, left_out)
    elif path.lower().endswith(SHARDS):
        yield from _shard(path, left_out)
    elif named or is_image(path):
        yield Item(path, os.path.abspath(path))
    else:
        left_out.file(path)


def _folder(path: str, left_out: LeftOut, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[Item]:
    """Yield a folder's images and shards, recursively; a link that leads back to a parent is not followed."""
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            names = sorted(filter(None, (_name(entry, left_out) for entry in entries)))
    except OSError as error:
        yield Item(path, os.path.abspath(path), problem=f"cannot list the folder: {why(error)}")
        return
    here = (status.st_dev, status.st_ino)
    if here in parents:
        return
    for name in names:
        inside = name if path == os.curdir else os.path.join(path, name)
        if name.endswith(os.sep):
            yield from _folder(inside.rstrip(os.sep), left_out, (*parents, here))
        elif name.lower().endswith(SHARDS):
            yield from _shard(inside, left_out)
        else:
            yield Item(inside, os.path.abspath(inside))


def _name(entry: os.DirEntry, left_out: LeftOut) -> str | None:
    """Return the name of an image, shard or folder (with a slash), else None: the names are all that is held."""
    name = entry.name
    if name.startswith("."):
        return None
    try:
        if entry.is_dir():
            return name + os.sep
        readable = is_image(name) or name.lower().endswith(SHARDS)
        if readable and entry.is_file():
            return name
        if readable or (entry.is_symlink() and not os.path.exists(entry.path)):
            left_out.images["links to nothing" if entry.is_symlink() else "special files"] += 1
        else:
            left_out.file(name)
    except OSError:
        left_out.images["files without access"] += 1
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


def _list(path: str, left_out: LeftOut, other: Opener | None) -> Iterator[Item]:
    """Yield the files named in a text file, one a line or separated by NUL bytes (find -print0).

    Empty lines and comments (#) are skipped.
    """
    try:
        yield from named_items(_names(path), path, left_out, other)
    except OSError as error:
        raise SourceError(f"cannot read the list {path}: {why(error)}") from error


def named_items(names: Iterable[str], table: str, left_out: LeftOut, other: Opener | None) -> Iterator[Item]:
    """Yield the images, shards and URLs that a list or table names.

    Relative names are looked up from the current folder, as arguments are, or from the folder of the table if the
    first one is only there.
    """
    folder = None
    for name in names:
        if "://" in name and other:
            yield from other(name, left_out, True)
            continue
        if folder is None and not os.path.isabs(name):
            beside = os.path.dirname(table)
            folder = beside if not os.path.lexists(name) and os.path.lexists(os.path.join(beside, name)) else ""
        # not checked here: a list may be long and its disk slow; a missing file is an error of its own
        name = os.path.normpath(os.path.join(folder or "", name))
        if name.lower().endswith(SHARDS):
            yield from _shard(name, left_out)
        else:
            yield Item(name, os.path.abspath(name))


def _names(path: str) -> Iterator[str]:
    """Yield the names in a list of files. Raises SourceError for UTF-16, which PowerShell writes; OSError."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise SourceError(f"the list {path} is UTF-16 text: save it as UTF-8")
        file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)  # after a byte order mark
        if b"\0" not in head:
            for line in file:
                name = line.rstrip(b"\r\n")
                if name.strip() and not name.startswith(b"#"):
                    yield os.fsdecode(name)
            return
        rest = b""
        while chunk := file.read(1 << 16):
            *names, rest = (rest + chunk).split(b"\0")
            yield from (os.fsdecode(name) for name in names if name)
        if rest.strip():
            yield os.fsdecode(rest)


def _shard(path: str, left_out: LeftOut) -> Iterator[Item]:
    """Yield the images of a tar shard (WebDataset); only headers are read here."""
    where = os.path.abspath(path)
    members: Members = {}
    problem = None
    try:
        with tarfile.open(path, "r:") as shard:
            read_members(shard, members, left_out, path)
    except (OSError, tarfile.TarError) as error:
        problem = f"the shard cannot be read to its end: {error}"
    for name, (offset, size) in members.items():
        yield Item(f"{path}/{name}", where, offset, size)
    if problem:
        yield Item(path, where, problem=problem)


def read_members(shard: tarfile.TarFile, members: Members, left_out: LeftOut, path: str) -> None:
    """Fill in the members that are images by their names; only headers are read. Raises OSError, tarfile.TarError.

    Of members with one name the last one counts, as when tar extracts them; the earlier ones are left out.
    """
    while (member := shard.next()) is not None:
        shard.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep every header
        name = member.name
        if os.path.basename(name).startswith("."):
            continue
        if not is_image(name):
            if os.path.splitext(name)[1].lower() in UNREAD_IMAGES:
                left_out.file(name)
        elif member.isreg() and not member.issparse():
            if name in members:
                left_out.replaced.append(f"{path}/{name}")
            members[name] = (member.offset_data, member.size)
        elif not member.isdir():
            left_out.images["links or sparse files in shards"] += 1
