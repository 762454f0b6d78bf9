"""Write captions as JSON lines, each complete or not at all, so that a run can be killed and resumed.

A sink takes `caption(record, item)` and `error(record)`, holds in `finished` the ids of earlier runs and of this
one, and is closed at the end. The other formats (serve/outputs/formats.py, serve/outputs/webdataset.py) build on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import stat
from pathlib import Path

import numpy as np

from serve.core.inputs import Item
from vlv.common.command import UserError, why
from vlv.common.jsonl import cut_torn_line, read_records

HEAD = b'{"id": "'  # of every record; a file that begins otherwise was not written here


class SinkError(UserError, OSError):
    """Raised when the output cannot be written or read; the message says which one and what to do."""


class IdSet:
    """A set of strings that takes about 10 bytes for each: it keeps 64-bit hashes.

    Of n ids, about n² / 2**65 collide: one in 370,000 runs over ten million images.
    """

    def __init__(self):
        self._sorted = np.empty(0, np.int64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, key: str) -> bool:
        value = hash(key)
        if value in self._recent:
            return True
        at = np.searchsorted(self._sorted, value)
        return bool(at < len(self._sorted) and self._sorted[at] == value)

    def add(self, key: str) -> bool:
        """Add a string; return False if it was there already."""
        if key in self:
            return False
        self._recent.add(hash(key))
        if len(self._recent) > max(1 << 16, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent = set()
        return True


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
        """Yield the records so far. Raises SinkError if a line is not a JSON object."""
        if not self._regular:  # a device holds no records
            return
        good = 0
        try:
            for record in read_records(self.path):
                record["id"]
                good += 1
                yield record
        except (ValueError, KeyError, TypeError) as error:
            raise SinkError(
                f"line {good + 1} of {self.path} is no record of a run: remove the line, or choose another -o"
            ) from error

    def clear(self) -> None:
        """Drop all records, which are kept elsewhere. Raises SinkError."""
        with explained(self.path):
            os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Close the file and release its lock; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileSink:
    """Write captions to `captions.jsonl`, and failed images to `captions.errors.jsonl` (created when needed).

    `finished` holds the ids of earlier runs and of this one.
    """

    def __init__(self, path: str | Path, model: str, resume: bool = True, flags: str = ""):
        """Open both files and read what is finished. Without `resume`, old files become `NAME.old`, `NAME.old2` ...

        Captions of two models (by their ids), or with other `flags`, are not mixed in one output. Raises SinkError.
        """
        self.path = Path(path)
        self.model = model
        self.flags = flags
        self.errors_path = self.path.with_name(self.path.stem + ".errors.jsonl")
        self.finished, self._errors = IdSet(), None
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
        """Fill `finished`."""
        for record in self._journal.records():
            self._done(record, self.journal_path)
        if self.errors_path.is_file():
            self._errors = JsonLines(self.errors_path)
            for record in self._errors.records():
                self.finished.add(record["id"])

    def _done(self, record: dict, where: Path) -> None:
        """Note an earlier run's record, found in `where`. Raises SinkError if it is of another model or other flags."""
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
        self.finished.add(record["id"])

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
            if self.path.exists() and not self.journal_path.exists() and any(self.path.iterdir()):
                raise SinkError(f"{self.path} is there already, and no output of a run: choose another -o")


class StreamSink:
    """Write captions to one stream of bytes (stdout) and errors to another; nothing is resumed."""

    errors_path = journal_path = None

    def __init__(self, captions: int, errors: int):
        self.finished = IdSet()
        self._captions, self._errors = captions, errors

    def caption(self, record: dict, item: Item) -> None:
        self._write(self._captions, record)

    def error(self, record: dict) -> None:
        self._write(self._errors, record)

    def close(self) -> None:
        """Nothing to close: the streams belong to the process."""

    def _write(self, fd: int, record: dict) -> None:
        line = (json.dumps(record) + "\n").encode()
        with explained("stdout"):
            while line:
                line = line[os.write(fd, line) :]


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
