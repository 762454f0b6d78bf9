"""Write captions as JSON lines, each complete or not at all, so that a run can be killed and resumed.

A sink takes `caption(record, item)` and `error(record)`, tells which images are finished (`is_finished(item)`), and is
closed at the end. The other formats (serve/outputs/formats.py, serve/outputs/webdataset.py) build on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.core.id_set import IdSet
from serve.core.inputs import Item, hash_of, key_of, stamp_of
from vlv.common.command import UserError, why
from vlv.common.files import atomic_write
from vlv.common.jsonl import cut_torn_line, read_records

HEAD = b'{"id": "'  # of every record; a file that begins otherwise was not written here


class SinkError(UserError, OSError):
    """Raised when the output cannot be written or read; the message says which one and what to do."""


class JsonLines:
    """Append JSON lines to a file, one write a line; one run at a time."""

    def __init__(self, path: Path):
        """Open or create, lock, and cut off a last line that a kill left unfinished.

        Raises SinkError; a file that holds no records is left as it is.
        """
        self.path = path
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if self._regular:  # not a device, which any number of runs may write
                self._lock()
                self._refuse_foreign()
                cut_torn_line(path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise SinkError(f"another run is writing {self.path}: wait for it, or choose another -o") from error
        except OSError:  # a file system without locks
            pass

    def _refuse_foreign(self) -> None:
        if not HEAD.startswith(os.pread(self._fd, len(HEAD), 0)):
            self.close()
            raise SinkError(f"{self.path} is there already, and no file of captions: choose another -o")

    def write(self, record: dict) -> None:
        """Append one record; it is in the file complete or not at all. Raises SinkError."""
        with explained(self.path):
            append(self._fd, json_bytes(record) + b"\n", self._regular)

    def records(self):
        """Yield the records so far. Raises SinkError if a line is not a JSON object with an id."""
        if not self._regular:  # a device holds no records
            return
        good = 0
        try:
            for record in read_records(self.path):
                if not isinstance(record["id"], str) or not isinstance(record.get("path"), str | None):
                    raise TypeError("id and path are texts")
                good += 1
                yield record
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise SinkError(
                f"line {good + 1} of {self.path} is not a record of a run: remove the line, or choose another -o"
            ) from error

    def clear(self) -> None:
        """Drop all records, which are kept elsewhere. Raises SinkError."""
        with explained(self.path):
            os.ftruncate(self._fd, 0)

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        """Remove records, atomically, and return how many. Raises SinkError."""
        return self.rewrite(lambda record: None if unwanted(record) else record)

    def rewrite(self, change: Callable[[dict], dict | None]) -> int:
        """Replace records, atomically, and return how many; None removes one. Raises SinkError."""
        if not self._regular or not (count := sum(change(record) is not record for record in self.records())):
            return 0
        old = self._fd
        try:
            with explained(self.path), atomic_write(self.path) as file:
                self._fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for record in self.records():
                    if (new := change(record)) is not None:
                        append(self._fd, json_bytes(new) + b"\n")
        finally:
            os.close(old)  # and its lock, once the new file has one and its name
        return count

    def close(self) -> None:
        """Close the file and release its lock; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileSink:
    """Write captions to `captions.jsonl`, and failed images to `captions.errors.jsonl` (created when needed)."""

    def __init__(self, path: str | Path, model: str, resume: bool = True, flags: str = "", verify: bool = False):
        """Open both files and read what is finished. Without `resume`, old files become `NAME.old`, `NAME.old2` ...

        `verify`: an image has changed if the hash of its file has, where its record has one, not if size or time have.
        Captions of two models (by their ids), or with other `flags`, are not mixed in one output. Raises SinkError.
        """
        self.path = Path(path)
        self.model = model
        self.flags = flags
        self.verify = verify
        self.errors_path = self.path.with_name(self.path.stem + ".errors.jsonl")
        self.finished = IdSet()  # keys of images, of earlier runs and of this one
        self.changed = 0  # images that are captioned again, since their files have changed
        self._moved = IdSet()  # aliases of images whose files have disappeared
        self._errors = None
        self._refuse_foreign()
        self._journal = JsonLines(self.journal_path)
        try:
            if not resume:
                self._start_over()
            self._read()
        except BaseException:
            FileSink.close(self)  # with the lock
            raise

    @property
    def journal_path(self) -> Path:
        """Return the file of JSON lines that captions are appended to."""
        return self.path

    def _refuse_foreign(self) -> None:
        """Raise SinkError if `path` holds something that no run has written; nothing is changed yet."""

    def _start_over(self) -> None:
        self._journal.close()
        for old in (self.path, self.journal_path, self.errors_path):
            with explained(old):
                if (old.is_file() and old.stat().st_size) or old.is_dir():
                    put_aside(old)
        self._journal = JsonLines(self.journal_path)

    def _read(self) -> None:
        """Fill `finished`; records of images that have changed since are dropped."""
        if self.errors_path.is_file():
            self._errors = JsonLines(self.errors_path)
        changed = 0
        for record, where in self._finished_records():
            self._refuse_others(record, where)
            changed += not self._note(record)
        for record in self._errors.records() if self._errors else ():
            changed += not self._note(record)
        if changed:
            self.changed = self.drop(self._has_changed)

    def _note(self, record: dict) -> bool:
        """Note the image of a record as finished; return False if its file has changed since."""
        if self._has_changed(record):
            return False
        self.finished.add(key_of(record["id"], record.get("path")))
        return True

    def _finished_records(self) -> Iterator[tuple[dict, Path]]:
        """Yield the captions' records, at least with id, path, model and flags, and the file of each."""
        for record in self._journal.records():
            yield record, self.journal_path

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        """Remove the records of images, captioned or failed, and return how many. Raises SinkError."""
        return self._journal.drop(unwanted) + (self._errors.drop(unwanted) if self._errors else 0)

    def patch(self, edits: dict[str, dict]) -> int:
        """Correct the captions of records by their ids, and return how many. Raises SinkError.

        `edits`: of read_patch. A record whose caption is not the one that was edited stays as it is.
        """

        def change(record: dict) -> dict:
            edit = edits.get(record["id"])
            if edit is None or record["caption"] != edit["before"]:
                return record
            texts = {"caption": edit["caption"]}
            if "captions" in record:
                texts["captions"] = [edit["caption"] if t == edit["before"] else t for t in record["captions"]]
            return {**record, **texts, "edited": True}

        return self._journal.rewrite(change)

    def _has_changed(self, record: dict) -> bool:
        """Return True if an image is not the file that was captioned; one that has disappeared has not changed."""
        if "path" not in record or "mtime_ns" not in record:  # of an earlier version
            return False
        now, before = stamp_of(record["path"]), (record.get("bytes"), record["mtime_ns"])
        if before[1] is None:  # an error, because there was no file
            return "error" in record and now is not None
        if now is None:
            self._moved.add(alias(record["id"], before[0]))
        elif self.verify and record.get("sha256"):
            return hash_of(record["path"]) != record["sha256"]
        return now not in (None, before)

    def is_finished(self, item: Item, size: int | None) -> bool:
        """Return True if an image, whose file has `size` bytes, is finished; note it if not.

        A file that was moved together with the list or folder that names it keeps its id, and stays finished.
        """
        return not self.finished.add(item.key) or alias(item.id, size) in self._moved

    def missing(self, listed: IdSet) -> Iterator[str]:
        """Yield the ids of captioned images that are not listed. `listed`: keys and aliases of images."""
        for record, _ in self._finished_records():
            if not is_listed(record, listed):
                yield record["id"]

    def _refuse_others(self, record: dict, where: Path) -> None:
        """Raise SinkError for a record, found in `where`, of another model or made with other flags."""
        if record.get("model", self.model) != self.model:
            raise SinkError(
                f"{where} holds captions of model {record['model']}, and this checkpoint is {self.model}: "
                "choose another -o, or start over with --no-resume"
            )
        if (flags := record.get("flags")) not in (None, self.flags):  # None: of an earlier version
            raise SinkError(
                f"{where} holds captions made {_with(flags)}, and this run is {_with(self.flags)}: "
                "choose another -o, or start over with --no-resume"
            )

    def caption(self, record: dict, item: Item) -> None:
        """Append the record of an item's caption. Raises SinkError; ImageError if the format cannot hold it."""
        self._journal.write(record)

    def error(self, record: dict) -> None:
        """Append the record of an image that failed. Raises SinkError."""
        if self._errors is None:
            self._errors = JsonLines(self.errors_path)
        self._errors.write(record)

    def close(self) -> None:
        """Complete the output, as far as the run has come, and release its lock. Raises SinkError."""
        for file in (self._journal, self._errors):
            if file is not None:
                file.close()


def _with(flags: str) -> str:
    return f"with {flags}" if flags else "without flags that change them"


class FolderSink(FileSink):
    """A sink whose `path` is a folder that contains the journal."""

    journal_name: str

    @property
    def journal_path(self) -> Path:
        return self.path / self.journal_name

    def _refuse_foreign(self) -> None:
        with explained(self.path):
            earlier = self.path / "_pending.jsonl"  # of earlier versions; `datasets` reads it as data
            if earlier.exists() and not self.journal_path.exists():
                earlier.rename(self.journal_path)
            if self.path.exists() and not self.journal_path.exists() and any(self.path.iterdir()):
                raise SinkError(f"{self.path} is there already, and no output of a run: choose another -o")


class StreamSink:
    """Write captions to one stream of bytes (stdout) and errors to another; nothing is resumed."""

    errors_path = journal_path = None
    changed = 0

    def __init__(self, captions: int, errors: int):
        self.finished = IdSet()
        self._captions = captions
        self._errors = errors

    def is_finished(self, item: Item, size: int | None) -> bool:
        return not self.finished.add(item.key)

    def missing(self, listed: IdSet) -> Iterator[str]:
        return iter(())

    def caption(self, record: dict, item: Item) -> None:
        write_line(self._captions, record)

    def error(self, record: dict) -> None:
        write_line(self._errors, record)

    def close(self) -> None:
        """Nothing to close: the streams belong to the process."""

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        return 0


def write_line(fd: int, record: dict) -> None:
    """Write a record as a line to a stream. Raises SinkError."""
    line = (json.dumps(record) + "\n").encode()
    with explained("stdout"):
        while line:
            line = line[os.write(fd, line) :]


def read_patch(file: Path) -> dict[str, dict]:
    """Return the corrections that a gallery page has saved, by the ids of records. Raises SinkError."""
    edits = {}
    if not file.is_file():
        raise SinkError(f"--patch: no such file: {file}")
    try:
        for record in read_records(file):
            texts = record if isinstance(record, dict) else {}
            if not all(isinstance(texts.get(name), str) for name in ("id", "before", "caption")):
                raise ValueError(f"expected texts id, before and caption in each line, got {str(record)[:80]}")
            edits[record["id"]] = record
    except (OSError, ValueError) as error:
        raise SinkError(f"--patch {file} is not a patch of a gallery page: {error}") from error
    return edits


def is_listed(record: dict, listed: IdSet) -> bool:
    """Return True if the image of a record is listed, by its key or its alias."""
    return key_of(record["id"], record.get("path")) in listed or alias(record["id"], record.get("bytes")) in listed


def alias(image_id: str, size: int | None) -> str:
    """Return what identifies an image after its folder was moved."""
    return f"{image_id}\0{size}"


def captions_of(record: dict) -> list[str]:
    """Return the captions of a record: one, or those that `-n` drew."""
    return record.get("captions") or [record["caption"]]


def put_aside(old: Path) -> None:
    """Rename to `NAME.old`, or to `NAME.old2` and so on: no earlier file is overwritten."""
    names = (old.with_name(f"{old.name}.old{number}") for number in itertools.chain([""], itertools.count(2)))
    os.rename(old, next(name for name in names if not os.path.lexists(name)))


def json_bytes(record: dict) -> bytes:
    """Return a record as one line of JSON, in UTF-8 if possible."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(record).encode()


def append(fd: int, data: bytes, undo: bool = True) -> None:
    """Append to a file in one write if the system accepts it; if it fails half-way, remove the rest (`undo`)."""
    written = os.write(fd, data)
    try:
        while written < len(data):
            written += os.write(fd, data[written:])
    except OSError:
        if undo:
            os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise


@contextlib.contextmanager
def explained(path: str | Path):
    """Turn an OSError about `path` into a SinkError of one sentence."""
    try:
        yield
    except SinkError:
        raise
    except OSError as error:
        again = "and run the same command again, it goes on where it stopped"
        remedy = {
            errno.ENOSPC: f"the disk is full: make room {again}",
            errno.EDQUOT: f"the disk quota is used up: make room {again}",
            errno.EFBIG: f"the file may not grow further: raise the limit (ulimit -f) {again}",
            errno.EACCES: "permission denied: choose another -o, or change the folder's permissions",
            errno.EROFS: "the file system is read-only: choose another -o",
            errno.EPIPE: "nobody reads it any more",
        }.get(error.errno or 0, f"{why(error)}: choose another -o" if error.errno else str(error))
        raise SinkError(f"cannot write {path}: {remedy}") from error
