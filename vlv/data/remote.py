"""Read files and byte ranges by path or URL: exactly the bytes that are asked for, neighbours in one request."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

from vlv.common.command import UserError, one_line

MAX_GAP = 2048  # bytes between two ranges that are still read in one request
ATTEMPTS = 4  # of a request to a server, with growing pauses


class DataError(UserError, ValueError):
    """Raised for training data that cannot be read; the message says which, and what to do."""


class ServerError(DataError):
    """Raised where a server does not answer: no fault of the row that was asked for."""


@dataclass(frozen=True, slots=True)
class Range:
    """A file, or `length` bytes of it from `offset`; with `up_to`, fewer where the file ends earlier."""

    path: str
    offset: int = 0
    length: int | None = None
    up_to: bool = False


def need(package: str, what: str):
    """Import an optional package. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{what} needs a package that is not installed: pip install {package}") from error


def is_url(path: str) -> bool:
    """Return True if the path is for fsspec to open."""
    return "://" in path


def open_file(path: str):
    """Open a binary file to be read from its beginning to its end, local or remote."""
    return need("fsspec", path).open(path, "rb").open() if is_url(path) else open(path, "rb")


def file_system(url: str):
    """Return fsspec's file system of a URL and the path in it. Raises DataError where a package is missing."""
    try:
        return need("fsspec", url).core.url_to_fs(url)
    except DataError:
        raise
    except Exception as error:  # fsspec and its packages have no common class of errors
        raise DataError(f"{url} cannot be opened: {one_line(error)}") from error


def list_files(url: str) -> list[str]:
    """Return the URLs of the files below a URL, or that match its pattern (*), by name. Raises DataError."""
    system, path = file_system(url)
    try:
        names = system.glob(path) if has_magic(path) else system.find(path)
    except FileNotFoundError as error:
        raise DataError(not_found(url, error)) from error
    except Exception as error:  # fsspec and its packages have no common class of errors
        raise DataError(f"{url} cannot be listed: {one_line(error)}") from error
    return [system.unstrip_protocol(name) for name in sorted(names)]


def not_found(name: str, error: Exception) -> str:
    """Return the sentence for a file, folder or data set that is not there; of a hub, it tells why and what to do."""
    kinds = {type(each).__name__ for each in (error, error.__cause__)}
    login = "log in (hf auth login, or the variable HF_TOKEN)"
    if "GatedRepoError" in kinds or "gated" in str(error):
        return f"{name} is gated: ask for access on its page on the hub, then {login}"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return f"{name} is not on the hub, or is private: check the name, or {login}"
    return f"no such file or folder: {name}"


def read_ranges(ranges: Sequence[Range], attempts: int = ATTEMPTS) -> list[bytes | OSError]:
    """Return the content of each range, or the error of a file that is not there or ends early.

    Ranges of one file that are at most MAX_GAP bytes apart are read together; the requests to a server go out at the
    same time. Raises ServerError where a server fails `attempts` times.
    """
    results: list[bytes | OSError] = [OSError("not read")] * len(ranges)
    merged = _merge(ranges)
    remote = [group for group in merged if is_url(group[0].path)]
    contents = dict(zip(map(id, remote), _fetch([merged_range for merged_range, _ in remote], attempts), strict=True))
    for group in merged:
        covering, members = group
        content = contents[id(group)] if id(group) in contents else _read_local(covering)
        for i in members:
            asked = ranges[i]
            if isinstance(content, OSError):
                results[i] = content
                continue
            start = asked.offset - covering.offset
            part = content[start:] if asked.length is None else content[start : start + asked.length]
            if asked.length is not None and len(part) < asked.length and not asked.up_to:
                results[i] = OSError(f"{asked.path} ends after {len(part)} of {asked.length} bytes at {asked.offset}")
            else:
                results[i] = part
    return results


def _merge(ranges: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """Return ranges that cover all of `ranges`, each with the numbers of those in it."""
    merged: list[tuple[Range, list[int]]] = []
    for i in sorted(range(len(ranges)), key=lambda i: (ranges[i].path, ranges[i].offset, ranges[i].length is None)):
        asked = ranges[i]
        if merged and asked.length is not None:
            last, members = merged[-1]
            if last.path == asked.path and last.length is not None:
                end = last.offset + last.length
                if asked.offset - end <= MAX_GAP:
                    length = max(end, asked.offset + asked.length) - last.offset
                    merged[-1] = (Range(last.path, last.offset, length), [*members, i])
                    continue
        merged.append((asked, [i]))
    return merged


def _read_local(asked: Range) -> bytes | OSError:
    try:
        with open(asked.path, "rb") as stream:
            stream.seek(asked.offset)
            return stream.read(-1 if asked.length is None else asked.length)
    except OSError as error:
        return error


def _fetch(ranges: Sequence[Range], attempts: int) -> list[bytes | OSError]:
    """Return the contents of remote ranges; those that fail are asked for again."""
    results: list[bytes | OSError] = [OSError("not read")] * len(ranges)
    left = list(range(len(ranges)))
    for attempt in range(attempts):
        found = _fetch_once([ranges[i] for i in left])
        again = []
        for i, content in zip(left, found, strict=True):
            if isinstance(content, FileNotFoundError):
                results[i] = content
            elif isinstance(content, Exception):
                again.append((i, content))
            else:
                results[i] = content
        if not again:
            return results
        left = [i for i, _ in again]
        if attempt + 1 < attempts:
            time.sleep(0.5 * 2**attempt)
    path, error = ranges[left[0]].path, again[0][1]
    raise ServerError(
        f"{path} could not be read in {attempts} attempts ({one_line(error)}): the same command goes on when its "
        "server answers again"
    ) from error


def _fetch_once(ranges: Sequence[Range]) -> list[bytes | Exception]:
    results: list[bytes | Exception] = []
    groups: dict[int, tuple] = {}
    for number, asked in enumerate(ranges):
        results.append(OSError("not read"))
        system, path = file_system(asked.path)
        groups.setdefault(id(system), (system, []))[1].append((number, path, asked))
    for system, members in groups.values():
        starts = [None if a.length is None and not a.offset else a.offset for *_, a in members]
        ends = [None if a.length is None else a.offset + a.length for *_, a in members]
        try:
            if "::" in members[0][2].path:  # a cache of files in between: it has no ranges of its own
                contents = [_read_through(asked) for *_, asked in members]
            else:
                contents = system.cat_ranges([path for _, path, _ in members], starts, ends, on_error="return")
        except Exception as error:
            contents = [error] * len(members)
        for (number, _, asked), content in zip(members, contents, strict=True):
            if isinstance(content, bytes) and asked.length is not None and len(content) > asked.length:
                raise DataError(
                    f"the server of {asked.path} does not serve ranges: write simplecache::{asked.path} to keep "
                    "the file on the disk"
                )
            results[number] = content
    return results


def _read_through(asked: Range) -> bytes | Exception:
    try:
        with open_file(asked.path) as stream:
            stream.seek(asked.offset)
            return stream.read(-1 if asked.length is None else asked.length)
    except Exception as error:
        return error


class RangedFile(io.RawIOBase):
    """A remote file that is read by ranges: of `block` bytes where less is asked for, else exactly what is.

    For readers that jump, as a scan of a tar's headers and of a Parquet file's columns: fsspec's own files would read
    5 MB ahead at every jump.
    """

    def __init__(self, path: str, block: int = 0):
        super().__init__()
        self.path = path
        self.block = block
        self.size = file_size(path)
        self._position = 0
        self._start, self._buffer = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.size, self._position + size)
        if end <= self._position:
            return b""
        if self._position < self._start or end > self._start + len(self._buffer):
            length = min(max(end - self._position, self.block), self.size - self._position)
            (content,) = read_ranges([Range(self.path, self._position, length)])
            if isinstance(content, OSError):
                raise content
            self._start, self._buffer = self._position, content
        part = self._buffer[self._position - self._start : end - self._start]
        self._position = end
        return part

    def readinto(self, buffer) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


def open_ranged(path: str, block: int = 0):
    """Open a binary file to be read at random, local or remote."""
    return RangedFile(path, block) if is_url(path) and "::" not in path else open_file(path)


def file_size(path: str) -> int:
    """Return a remote file's size. Raises DataError where it is not there, ServerError where the server fails."""
    return _ask(path, lambda system, inner: system.info(inner)["size"])


def file_stamp(path: str) -> list:
    """Return what tells a remote file from a later one of the same name: URL, size, and tag or date."""
    about = _ask(path, lambda system, inner: system.info(inner))
    return [path, about.get("size"), str(about.get("ETag") or about.get("LastModified") or about.get("mtime"))]


def _ask(path: str, question: Callable):
    system, inner = file_system(path)
    for attempt in range(ATTEMPTS):
        try:
            return question(system, inner)
        except FileNotFoundError as error:
            raise DataError(not_found(path, error)) from error
        except Exception as error:  # fsspec and its packages have no common class of errors
            last = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(0.5 * 2**attempt)
    raise ServerError(f"{path} cannot be reached ({one_line(last)})") from last


def cache_folder(kind: str) -> Path:
    """Return the folder of a kind of cached files: $XDG_CACHE_HOME/vlv/KIND."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlv" / kind


def drop_old(folder: Path, pattern: str, limit: int, last: Path) -> None:
    """Delete the files of a pattern used longest ago until they take at most `limit` bytes; `last` stays."""
    found = []
    for file in folder.rglob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process deletes as well
            status = file.stat()
            found.append((status.st_mtime_ns, status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= limit:
            return
        if file != last:
            file.unlink(missing_ok=True)
            total -= size
