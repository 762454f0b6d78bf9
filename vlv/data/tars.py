"""WebDataset shards read at random, by an index of their members that is made once and kept.

Members of one name up to the first dot make a row, as WebDataset groups them. The row's image is the member that has
one ending alone, the first of ORDER: of 7.jpg, 7.png and 7.mask.png it is 7.jpg. A name that is twice in a tar counts
once, with its last content, as tar extracts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlv.common.files import atomic_write
from vlv.data.image import EXTENSIONS
from vlv.data.remote import DataError, Range, cache_folder, file_stamp, is_url, open_ranged, read_ranges
from vlv.data.samples import Rows, Sample, described

FORMAT = 2  # of the index
BLOCK = 2048  # bytes of a remote tar read at a header: with a short caption between, two headers in one request
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
            Range(file, offset, length)
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
    if is_url(file):
        stamp = file_stamp(file)
    else:
        status = os.stat(file)
        stamp = [os.path.abspath(file), status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps([FORMAT, *stamp]).encode()).hexdigest()
    return cache_folder("tars") / f"{digest[:24]}.json"


def _scan(file: str) -> list[Member]:
    members = []
    try:
        with open_ranged(file, BLOCK) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would remember every header
                if member.isreg() and not member.issparse() and member.name.lower().endswith((*EXTENSIONS, *TEXTS)):
                    members.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{file} is no complete tar file ({error}): write it again") from error
    return members
