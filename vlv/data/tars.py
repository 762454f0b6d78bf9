"""WebDataset shards read at random, by an index of their members that is made once and kept.

Members of one name up to the first dot make a row, as WebDataset groups them. The row's image is the member that has
one ending alone, the first of ORDER: of 7.jpg, 7.png and 7.mask.png it is 7.jpg. A name that is twice in a tar counts
once, with its last content, as tar extracts it. A compressed tar (.tar.gz, .tgz, .tar.bz2, .tar.xz) is decompressed
once and kept in $XDG_CACHE_HOME/vlv/plain, since its members cannot be read at random.
"""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlv.common.files import atomic_write
from vlv.data.image import EXTENSIONS
from vlv.data.remote import (
    DataError,
    Range,
    cache_folder,
    drop_old,
    file_stamp,
    is_url,
    open_file,
    open_ranged,
    read_ranges,
)
from vlv.data.samples import Rows, Sample, described

FORMAT = 2  # of the index
BLOCK = 2048  # bytes of a remote tar read at a header: with a short caption between, two headers in one request
COMPRESSED = {".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": lzma.open}
ENDINGS = (".tar", *COMPRESSED)
KEPT_BYTES = 16 << 30  # of decompressed tars on the disk
SCANS = 16  # tars scanned at the same time
ORDER = (".jpg", ".jpeg", ".png", ".webp", *sorted(EXTENSIONS - {".jpg", ".jpeg", ".png", ".webp"}))
TEXTS = (".json", ".txt")  # the first that has a caption counts

Member = tuple[str, int, int]  # name, offset and length of the content


@dataclass(frozen=True, slots=True)
class Row:
    """Where a row's image and texts lie: (suffix, offset, length)."""

    key: str
    image: Member
    texts: tuple[Member, ...]


class Tars(Rows):
    """One shard a tar. `image_key` names the ending of the row's image, as in mask.png, instead of ORDER."""

    def __init__(self, files: list[str], image_key: str | None = None):
        self.files = files
        self._image_key = image_key
        with ThreadPoolExecutor(SCANS) as pool:
            indexed = [_rows(members, image_key) for members in pool.map(image_and_text_members, files)]
        self._rows = [rows for rows, _ in indexed]
        self.rows = [len(rows) for rows in self._rows]
        self._stamps = [_index_file(file).stem for file in files]
        self.notes = [f"{file}: {note}" for file, (_, notes) in zip(files, indexed, strict=True) for note in notes]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._stamps} {self._image_key}".encode()).hexdigest()

    def name(self, shard: int, row: int) -> str:
        return f"{self.files[shard]}/{self._rows[shard][row].key}"

    def read_many(
        self, places: Sequence[tuple[int, int]], texts: bool = True, head: int | None = None
    ) -> list[Sample | Exception]:
        found = [(self.files[shard], self._rows[shard][row]) for shard, row in places]
        parts = [(_head(row.image, head), *(row.texts if texts else ())) for _, row in found]
        ranges = [
            Range(plain_tar(file), offset, length)
            for (file, _), members in zip(found, parts, strict=True)
            for _, offset, length in members
        ]
        contents = iter(read_ranges(ranges))
        samples: list[Sample | Exception] = []
        for place, members in zip(places, parts, strict=True):
            image, *beside = [next(contents) for _ in members]
            named = [(f"{self.name(*place)}{suffix}", c) for (suffix, *_), c in zip(members[1:], beside, strict=True)]
            samples.append(
                image if isinstance(image, Exception) else Sample(self.name(*place), image, **described(named))
            )
        return samples


def _head(member: Member, length: int | None) -> Member:
    return member if length is None else (member[0], member[1], min(member[2], length))


def _rows(members: list[Member], image_key: str | None) -> tuple[list[Row], list[str]]:
    """Return the rows of a tar, and what is to be known of it."""
    groups: dict[str, dict[str, Member]] = {}
    for name, offset, length in members:  # of equal names the last one stays
        key, suffix = _split(name)
        groups.setdefault(key, {})[suffix] = (suffix, offset, length)
    rows, several, dotted = [], [], []
    for key, parts in groups.items():
        wanted = [f".{image_key.lstrip('.')}"] if image_key else ORDER
        images = [parts[suffix] for suffix in wanted if suffix in parts]
        others = [s for s in parts if s.count(".") > 1 and s.endswith(tuple(EXTENSIONS))]
        if len(images) > 1:
            several.append(key)
        if others and not image_key:
            dotted.append(f"{key}{others[0]}")
        if images:
            rows.append(Row(key, images[0], tuple(parts[t] for t in TEXTS if t in parts)))
    notes = []
    if several:
        notes.append(
            f"{len(several)} rows have several images (the first: {several[0]}): the first of "
            f"{' '.join(s[1:] for s in ORDER[:4])} … counts; --image-key chooses another"
        )
    if dotted:
        notes.append(
            f"{len(dotted)} rows have images whose names go on after the first dot (the first: {dotted[0]}): they are "
            "left alone; --image-key takes them"
        )
    return rows, notes


def _split(name: str) -> tuple[str, str]:
    """Return a member's key, its name up to the first dot of its last part, and its suffix in lower case."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, (dot + suffix).lower()


def image_and_text_members(file: str) -> list[Member]:
    """Return the image and text members of a tar, from the index that is kept or by a scan of all headers.

    The index is kept in $XDG_CACHE_HOME/vlv/tars by the file's name, size and date.
    """
    kept = _index_file(file)
    if kept.exists():
        return [tuple(member) for member in json.loads(kept.read_text())]
    found = _scan(file)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept, shared=True) as temporary:
        temporary.write_text(json.dumps(found))
    return found


def _index_file(file: str) -> Path:
    return cache_folder("tars") / f"{_digest(file)}.json"


def _digest(file: str) -> str:
    if is_url(file):
        stamp = file_stamp(file)
    else:
        status = os.stat(file)
        stamp = [os.path.abspath(file), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps([FORMAT, *stamp]).encode()).hexdigest()[:24]


def plain_tar(file: str) -> str:
    """Return a tar that can be read at random: the file itself, or what it holds, decompressed once and kept.

    The kept ones that were used longest ago go beyond KEPT_BYTES. Raises DataError, OSError.
    """
    opener = next((opener for ending, opener in COMPRESSED.items() if file.lower().endswith(ending)), None)
    if opener is None:
        return file
    kept = cache_folder("plain") / f"{_digest(file)}.tar"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process decompresses it, the others wait
        with contextlib.suppress(FileNotFoundError):
            os.utime(kept)
            return str(kept)
        try:
            with (
                open_file(file) as stream,
                opener(stream) as content,
                atomic_write(kept, shared=True) as plain,
                open(plain, "wb") as target,
            ):
                shutil.copyfileobj(content, target, 1 << 20)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{file} cannot be decompressed to its end ({error}): write it again") from error
    drop_old(kept.parent, "*.tar", KEPT_BYTES, kept)
    return str(kept)


@contextlib.contextmanager
def open_tar(file: str, block: int = BLOCK) -> Iterator[tarfile.TarFile]:
    """Open a tar, local or remote, also a compressed one. Raises DataError, OSError, tarfile.TarError."""
    with open_ranged(plain_tar(file), block) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        yield tar


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's members, of which only the headers are read and none is held. Raises OSError, tarfile.TarError."""
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would remember every header
        yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(tarfile.BLOCKSIZE)
    if rest.count(0) < len(rest):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged")


def _scan(file: str) -> list[Member]:
    members = []
    try:
        with open_tar(file) as tar:
            for member in headers(tar):
                if member.isreg() and not member.issparse() and member.name.lower().endswith((*EXTENSIONS, *TEXTS)):
                    members.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{file} is no complete tar file ({error}): write it again") from error
    return members
