"""Write files and folders atomically, hash them, and copy trees by hard links."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlv.common.command import UserError


class OutputError(UserError, ValueError):
    """Raised where an output cannot be written."""


class OutputExists(OutputError):
    """Raised where the output folder has content already."""


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless `needed` bytes fit on the disk of `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free: "
            "free some space or choose another --out"
        )


@contextmanager
def atomic_folder(out: Path, needed: int, force: bool = False) -> Iterator[Path]:
    """Give a folder to fill with `needed` bytes; renamed to `out` on success, deleted on error.

    Another process that makes the same folder at the same time waits; what a killed run left behind is removed.
    Raises OutputExists where `out` has content, unless `force` lets it be replaced; OutputError where the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    lock = os.open(out.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if out.exists() and not force and (out.is_file() or any(out.iterdir())):
            raise OutputExists(f"{out} exists and is not empty: choose another --out, or replace it with --force")
        shutil.rmtree(partial, ignore_errors=True)
        require_space(out.parent, needed)
        partial.mkdir()
        yield partial
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


@contextmanager
def atomic_write(file: Path, shared: bool = False) -> Iterator[Path]:
    """Give the path of a temporary file to write; renamed to `file` on success, deleted on error.

    `shared`: other processes may be writing the same file at the same time.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp" if shared else f".{file.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: object, indent: int | None = 2) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hex; computed once while its size and time stay the same."""
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link_file(source: str | Path, target: str | Path) -> None:
    """Copy a file by a hard link where the file system allows it, so that its content is not doubled."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder atomically, by hard links where the file system allows it, so that weights are not doubled."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_file)
    os.replace(partial, target)
