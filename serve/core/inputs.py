"""List the images of files, folders, globs, lists, shards, tables, data sets and URLs, as a lazy stream of items.

    items = expand(["photos/", "s3://bucket/shards/{00000..00099}.tar", "list.csv", "train.parquet", "hf:user/name"])

Memory does not grow with the number of images: only the listing of the folder or shard that is being read is held.
The order is that of the arguments, sorted by name within a folder. Shards, tables and URLs are read by vlv.data, as in
training.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from vlv.common.command import Misuse, one_line, why
from vlv.data import remote
from vlv.data.decoding.jpeg import intact_part
from vlv.data.decoding.optional import missing_package
from vlv.data.image import EXTENSIONS, ImageError
from vlv.data.image_files import is_image, numbered_paths
from vlv.data.parquet import FOOTER, NESTED, Parquet, image_column
from vlv.data.remote import DataError, Range, is_url, need, open_ranged, read_ranges
from vlv.data.samples import table_records
from vlv.data.sources import HuggingFace
from vlv.data.tars import ENDINGS as SHARDS
from vlv.data.tars import headers, open_tar, plain_tar

LISTS = (".txt",)
ROWS = ".parquet"
TABLES = (ROWS, ".jsonl", ".csv")
DATASET = "hf:"  # begins the name of a data set of the `datasets` library
UNREAD_SHARDS = (".tar.zst", ".tar.lz4")
COLUMNS = ("url", "path", "file_name", "image", "id")  # the first that a table has names the images
HEADERS = 1 << 16  # bytes that are fetched at a time while a remote shard is listed
ATTEMPTS = 2  # to read a URL
# endings of images that are not read, some of them only without an optional package
UNREAD_IMAGES = frozenset(
    ".heic .heif .hif .jxl .tga .psd .svg .eps .ico .icns .jxr .wdp .exr .hdr .dds .xcf .pcx .qoi .jpf .jpx .jpm .mj2"
    " .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw".split()
)
SHOWN = 5  # names in a message
Members = dict[str, tuple[int, int]]  # by name: offset and size of the content


class SourceError(Misuse):
    """Raised for an argument that leads to no images; the message says which one and why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image, or (with `problem`) a source whose images cannot be listed.

    `id` is the path as the arguments give it, for a member of a shard `shard.tar/member`, for a row `file.parquet/17`.
    `path` is the file or URL that holds the bytes: all of it, `length` bytes from `offset`, or the `column` of a `row`.
    With `lenient`, a truncated JPEG file is completed, so that its intact part is decoded.
    """

    id: str
    path: str
    offset: int = 0
    length: int | None = None
    problem: str | None = None
    row: int | None = None
    column: str | None = None
    lenient: bool = False

    @property
    def key(self) -> str:
        """Return what identifies the image, however the arguments spell its path."""
        return key_of(self.id, self.path)

    @property
    def is_file(self) -> bool:
        """Return True if the image is a local file, not one behind a URL or within a shard or table."""
        return self.length is None and self.row is None and not is_url(self.path)

    def __reduce__(self):  # every image is pickled once, and the dataclass's own method is several times slower
        values = (self.id, self.path, self.offset, self.length, self.problem, self.row, self.column, self.lenient)
        return Item, values

    def read(self) -> bytes:
        """Return the image file's content. Raises ImageError."""
        if self.problem:
            raise ImageError("unreadable", self.problem)
        try:
            content = self._content()
        except (OSError, ValueError, ImportError) as error:
            content = error
        if isinstance(content, FileNotFoundError):
            raise ImageError("missing", "there is no such file") from content
        if isinstance(content, OSError) and content.errno:
            raise ImageError("unreadable", f"cannot read the file: {why(content)}") from content
        if isinstance(content, OSError):  # of read_ranges
            raise ImageError("damaged", f"the shard is shorter than its headers say: {content}") from content
        if isinstance(content, Exception):
            reason = str(content) if isinstance(content, DataError) else one_line(content.__cause__ or content)
            raise ImageError("unreadable", f"cannot be read: {reason}") from content
        return intact_part(content) if self.lenient else content

    def _content(self) -> bytes | Exception:
        if self.row is not None:
            return _read_row(self.path, self.column, self.row)
        path = self.path if self.length is None else plain_tar(self.path)
        (content,) = read_ranges([Range(path, self.offset, self.length)], ATTEMPTS)
        return content


def _read_row(path: str, column: str | None, row: int) -> bytes:
    source, ends = _rows(path, column)
    shard = int(np.searchsorted(ends, row, side="right"))
    return source.read(shard, row - int(ends[shard]) + source.rows[shard]).image


@functools.lru_cache(8)
def _rows(path: str, column: str | None):
    """Return a source of rows, and the numbers of rows up to the end of each of its shards. Raises DataError."""
    source = Parquet([path], path, column) if path.endswith(ROWS) else HuggingFace([path], path, column)
    return source, np.cumsum(source.rows)


def key_of(image_id: str, path: str | None) -> str:
    """Return what identifies an image: its path, with the folder's links resolved, and its name within a shard."""
    if not path or is_url(path) or path.startswith(DATASET):
        return image_id
    folder, name = os.path.split(path)
    key = os.path.join(_real_folder(folder), name)
    member = image_id.find(f"{name}/")
    return key if os.path.basename(image_id) == name or member < 0 else key + image_id[member + len(name) :]


@functools.lru_cache(1 << 12)
def _real_folder(folder: str) -> str:
    try:
        return os.path.realpath(folder)
    except ValueError:  # no name of a file, such as in a record that was edited
        return folder


def stamp_of(path: str) -> tuple[int, int] | None:
    """Return size and time (ns) of the last change of a file, None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def hash_of(path: str) -> str | None:
    """Return the SHA-256 of a file's content in hex, None for a URL or if it cannot be read."""
    try:
        status = os.stat(path)
        return _hash_of(path, status.st_ino, status.st_size, status.st_ctime_ns)
    except (OSError, ValueError):
        return None


@functools.lru_cache(256)  # a shard is asked for once for each of its members
def _hash_of(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def expand(
    paths: Sequence[str], left_out: LeftOut | None = None, column: str | None = None, lenient: bool = False
) -> Iterator[Item]:
    """Yield the images of files, folders (recursive), globs, .txt lists, shards, tables, data sets and URLs, in order.

    A path with {00000..00099} stands for the paths with these numbers. Hidden files and folders are left out of
    folders and globs; `left_out` counts what else is. A .txt file with an image of the same name beside it is that
    image's caption, not a list. `column` of tables holds the images, their URLs or paths; None: the first that does.
    `lenient` is that of Item. Raises SourceError at once if a path does not exist or all of them hold no image.
    """
    paths = [one for path in paths for one in numbered_paths(path)]
    for path in paths:
        if is_url(path) or path.startswith(DATASET):
            continue
        if not os.path.lexists(path) and not glob.has_magic(path):
            raise SourceError(f"no such file or folder: {path}")
        if path.lower().endswith(UNREAD_SHARDS):
            raise SourceError(f"{path} is a compressed shard of a kind that is not read: decompress it")
    counts = left_out or LeftOut()
    listing = _Listing(counts, column)
    items = itertools.chain.from_iterable(listing.argument(path) for path in paths)
    first = next(items, None)
    if first is None:
        kinds = " ".join(sorted(EXTENSIONS))
        about = f" ({counts})" if str(counts) else ""
        raise SourceError(f"no images in {', '.join(paths)}: looked for {kinds}, .tar shards and .parquet{about}")
    items = itertools.chain([first], items)
    return (dataclasses.replace(item, lenient=True) for item in items) if lenient else items


def part_of(items: Iterator[Item], part: int, parts: int) -> Iterator[Item]:
    """Return every `parts`-th item, for one of `parts` workers (`part` from 1): their numbers differ by one at most."""
    return itertools.islice(items, part - 1, None, parts)


def file_system(url: str):
    """Return fsspec's file system of a URL or path, and the path in it. Raises SourceError."""
    try:
        fs, path = remote.file_system(url)
    except DataError as error:
        raise SourceError(str(error)) from error
    return fs, path.rstrip("/")


class _Listing:
    """List the images of arguments; what each kind of them leaves out is counted."""

    def __init__(self, left_out: LeftOut, column: str | None):
        self.left_out = left_out
        self.column = column
        self.folders: set[str] = set()  # that are listed

    def argument(self, path: str) -> Iterator[Item]:
        if is_url(path):
            return self.url(path, False)
        if path.startswith(DATASET):
            return self.dataset(path, path)
        path = os.path.normpath(path)
        if not os.path.lexists(path) and glob.has_magic(path):
            return itertools.chain.from_iterable(self.entry(p, False) for p in _glob(path))
        if path.lower().endswith(LISTS) and not os.path.isdir(path):
            if _is_caption(path):
                self.left_out.file(path)
                return iter(())
            return self.text_list(path)
        if os.path.isfile(os.path.join(path, "dataset_info.json")):  # a folder of Dataset.save_to_disk
            return self.dataset(path, f"{DATASET}{os.path.abspath(path)}")
        return self.entry(path, True)

    def entry(self, path: str, named: bool) -> Iterator[Item]:
        """Yield the items of a folder, shard, table or file; a file that is not `named` needs an image's extension."""
        name = path.lower()
        if os.path.isdir(path):
            yield from self.folder(path)
        elif name.endswith(SHARDS):
            yield from self.shard(path)
        elif name.endswith(ROWS):
            yield from self.parquet(path, named)
        elif named and name.endswith(TABLES):
            yield from self.table(path)
        elif named or is_image(path):
            yield Item(path, os.path.abspath(path))
        else:
            self.left_out.file(path)

    def folder(self, path: str) -> Iterator[Item]:
        """Yield a folder's images, recursively; a folder that is listed already, by a link or argument, is left out."""
        real = os.path.realpath(path)
        if real in self.folders:
            return
        self.folders.add(real)
        try:
            with os.scandir(path) as entries:
                names = sorted(filter(None, (_name(entry, self.left_out) for entry in entries)))
        except OSError as error:
            yield Item(path, os.path.abspath(path), problem=f"cannot list the folder: {why(error)}")
            return
        for name in names:
            inside = name if path == os.curdir else os.path.join(path, name)
            if name.endswith(os.sep):
                yield from self.folder(inside.rstrip(os.sep))
            elif is_image(name):
                yield Item(inside, os.path.abspath(inside))
            else:
                yield from self.entry(inside, False)

    def url(self, path: str, listed: bool) -> Iterator[Item]:
        """Yield the images of a URL; one that a list or table names is an image, if it is no shard."""
        try:
            inside = urlsplit(path).path.lower()
        except ValueError as error:
            if not listed:
                raise SourceError(f"{path} is not a URL: {error}") from error
            yield Item(path, path, problem=f"it is not a URL: {error}")
            return
        fs, name = file_system(path)
        if glob.has_magic(name) and not listed:
            yield from self.remote_folder(path)
        elif inside.endswith(SHARDS):
            yield from self.shard(path)
        elif listed or not inside.endswith(TABLES):
            if listed or (
                path.startswith(("http://", "https://")) and not path.endswith("/")
            ):  # its end may say nothing
                yield Item(path, path)
            else:
                yield from self.remote_folder(path)
        elif not fs.exists(name):
            raise SourceError(self._absent(path))
        elif inside.endswith(ROWS):
            yield from self.parquet(path, True)
        else:
            yield from self.table(path)

    @staticmethod
    def _absent(path: str) -> str:
        """Return the sentence for a remote file that is not there."""
        try:
            remote.file_size(path)
        except DataError as error:
            return str(error)
        return f"no such file: {path}"

    def remote_folder(self, url: str) -> Iterator[Item]:
        try:
            names = remote.list_files(url)
        except DataError as error:
            raise SourceError(str(error)) from error
        if not any(is_image(name) or name.lower().endswith((*SHARDS, ROWS)) for name in names):
            raise SourceError(f"no images at {url}")
        for name in names:
            if name.lower().endswith(SHARDS):
                yield from self.shard(name)
            elif name.lower().endswith(ROWS):
                yield from self.parquet(name, False)
            elif is_image(name):
                yield Item(name, name)
            else:
                self.left_out.file(name)

    def text_list(self, path: str) -> Iterator[Item]:
        """Yield the files named in a text file, one a line or separated by NUL bytes (find -print0).

        Empty lines and comments (#) are skipped.
        """
        try:
            yield from self.named(_names(path), path)
        except OSError as error:
            raise SourceError(f"cannot read the list {path}: {why(error)}") from error

    def table(self, path: str) -> Iterator[Item]:
        """Yield the images that the records of a .jsonl or .csv file name."""
        try:
            yield from self.named(self._names_in(path), path)
        except DataError as error:
            raise SourceError(str(error)) from error

    def _names_in(self, path: str) -> Iterator[str]:
        for line, record in table_records(path):
            yield str(record[self._column(f"line {line} of {path}", list(record))] or "")

    def _column(self, where: str, names: Sequence[str]) -> str:
        found = next((name for name in ([self.column] if self.column else COLUMNS) if name in names), None)
        if found is None:
            expected = f"column {self.column}" if self.column else f"column {', '.join(COLUMNS)}"
            raise SourceError(f"{where} has no {expected}: it has {list(names)}; choose --url-column")
        return found

    def named(self, names: Iterable[str], table: str) -> Iterator[Item]:
        """Yield the images, shards and URLs that a list or table names.

        Relative names are looked up from the current folder, as arguments are, or from the folder of the table if the
        first one is only there, or the table has a URL.
        """
        beside, folder = os.path.dirname(table), None
        for name in names:
            if not name or "\0" in name or not _is_encodable(name):
                shown = ascii(name) if name else "a record without one"
                yield Item(f"{table}/{shown}", table, problem=f"expected the name of an image, got {shown}")
                continue
            if is_url(name) or is_url(table):
                yield from self.url(name if is_url(name) else f"{beside}/{name}", True)
                continue
            if folder is None and not os.path.isabs(name):
                only_beside = not os.path.lexists(name) and os.path.lexists(os.path.join(beside, name))
                folder = beside if only_beside else ""
            # not checked here: a list may be long and its disk slow; a missing file is an error of its own
            name = os.path.normpath(os.path.join(folder or "", name))
            if name.lower().endswith(SHARDS):
                yield from self.shard(name)
            else:
                yield Item(name, os.path.abspath(name))

    def parquet(self, path: str, named: bool) -> Iterator[Item]:
        """Yield the rows of a Parquet file with image bytes; of a `named` one without, the images that it names."""
        try:
            parquet = need("pyarrow.parquet", path)
            with open_ranged(path, FOOTER) as stream:
                file = parquet.ParquetFile(stream)
                if column := image_column(file.schema_arrow, self.column):
                    yield from self.rows(path, path if is_url(path) else os.path.abspath(path), column)
                elif named:
                    name = self._column(path, file.schema_arrow.names)
                    kind = str(file.schema_arrow.field(name).type)
                    if kind.startswith(NESTED):
                        raise SourceError(
                            f"{path}: expected image files (binary) or their names in column {name}, got {kind}; "
                            "choose --url-column"
                        )
                    batches = (batch.column(0).to_pylist() for batch in file.iter_batches(columns=[name]))
                    yield from self.named((str(value or "") for values in batches for value in values), path)
                else:
                    self.left_out.file(path)
        except SourceError:
            raise
        except (OSError, ValueError) as error:  # also pyarrow's
            if named:
                raise SourceError(f"{path} cannot be read: {one_line(error)}") from error
            yield Item(path, os.path.abspath(path), problem=f"cannot be read: {one_line(error)}")

    def dataset(self, name: str, path: str) -> Iterator[Item]:
        """Yield the rows of a data set of the `datasets` library."""
        try:
            yield from self.rows(name, path, self.column)
        except DataError as error:
            raise SourceError(str(error)) from error

    def rows(self, name: str, path: str, column: str | None) -> Iterator[Item]:
        _, ends = _rows(path, column)
        for row in range(int(ends[-1]) if len(ends) else 0):
            yield Item(f"{name}/{row}", path, row=row, column=column)

    def shard(self, path: str) -> Iterator[Item]:
        """Yield the images of a tar shard (WebDataset); only headers are read here."""
        where = path if is_url(path) else os.path.abspath(path)
        members: Members = {}
        problem = None
        try:
            with open_tar(where, HEADERS) as shard:
                self.members(shard, members, path)
        except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: DataError of a server
            problem = f"the shard cannot be read to its end: {error}"
        for name, (offset, size) in members.items():
            yield Item(f"{path}/{name}", where, offset, size)
        if problem:
            yield Item(path, where, problem=problem)

    def members(self, shard: tarfile.TarFile, members: Members, path: str) -> None:
        """Fill in the members that are images, by their names. Raises OSError, tarfile.TarError.

        Of members with one name the last one counts, as when tar extracts them; the earlier ones are left out.
        """
        for member in headers(shard):
            name = member.name
            if os.path.basename(name).startswith("."):
                continue
            if not is_image(name):
                if os.path.splitext(name)[1].lower() in UNREAD_IMAGES:
                    self.left_out.file(name)
            elif member.isreg() and not member.issparse():
                if name in members:
                    self.left_out.replaced.append(f"{path}/{name}")
                members[name] = (member.offset_data, member.size)
            elif not member.isdir():
                self.left_out.images["links or sparse files in shards"] += 1


def _is_encodable(name: str) -> bool:
    """Return True if a file can have this name: JSON can hold text that no file system takes."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _is_caption(path: str) -> bool:
    """Return True if an image of the same name is beside a text file, as after a run with --format txt."""
    stem = os.path.splitext(path)[0]
    return any(os.path.exists(stem + extension) for extension in (*EXTENSIONS, *map(str.upper, EXTENSIONS)))


def _name(entry: os.DirEntry, left_out: LeftOut) -> str | None:
    """Return the name of an image, shard or folder (with a slash), else None: the names are all that is held."""
    name = entry.name
    if name.startswith("."):
        return None
    try:
        if entry.is_dir():
            return name + os.sep
        readable = is_image(name) or name.lower().endswith((*SHARDS, ROWS))
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
