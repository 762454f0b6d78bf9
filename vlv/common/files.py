"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlv.checkpoints.folder import CheckpointError


class Occupied(CheckpointError):
    """The place of the output is taken."""


def require_room(folder: Path, needed: int) -> None:
    """Raise CheckpointError unless `needed` bytes fit on the disk of `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{needed / 1e9:.1f} GB are to be written to {folder}, where {free / 1e9:.1f} GB are free: "
            "make room or choose another --out"
        )


@contextmanager
def fresh_folder(out: Path, needed: int, force: bool = False) -> Iterator[Path]:
    """A folder to fill with `needed` bytes; it takes the name `out` when the block ends well, else disappears.

    Whoever makes the same folder at the same time waits; what a killed run left behind is removed.
    Raises Occupied where `out` has content, unless `force` lets it be replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    lock = os.open(out.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if out.exists() and not force and (out.is_file() or any(out.iterdir())):
            raise Occupied(f"{out} exists and is not empty: choose another --out, or replace it with --force")
        shutil.rmtree(partial, ignore_errors=True)
        require_room(out.parent, needed)
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
def whole(file: Path, among_many: bool = False) -> Iterator[Path]:
    """The path to write `file` at: it takes its name when the block ends well, else disappears.

    `among_many`: other processes may be writing the same file.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp" if among_many else f".{file.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder by hard links where the file system allows it, so that weights are not doubled.

    `target` appears whole or not at all.
    """
    partial = target.with_name(f".{target.name}.partial")

    def link(file: str, copy: str) -> None:
        try:
            os.link(os.path.realpath(file), copy)
        except OSError:
            shutil.copyfile(file, copy)

    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link)
    os.replace(partial, target)
