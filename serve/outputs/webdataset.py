"""Write WebDataset shards: image, caption and record beside each other in tar files, in the order of the input.

    000000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.png  ...

Images of shards go into shards of the same names, with their keys and the other members of their samples; a .txt or
.json that an image had there becomes .original.txt or .original.json.

A caption is finished when its record is in `.pending.jsonl`, where it waits for those before it. Then its sample is
appended in one write. What a kill tore is cut off, and a record whose sample is there is no longer waiting.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from serve.core.id_set import IdSet
from serve.core.inputs import SHARDS, Item, key_of, stamp_of
from serve.core.record import error_record
from serve.outputs.jsonl import FolderSink, SinkError, append, explained, json_bytes
from serve.outputs.text import lines
from vlv.common.files import atomic_write
from vlv.data.decoding.optional import optional_format
from vlv.data.image import ImageError
from vlv.data.image_files import is_image
from vlv.data.remote import Range, read_ranges
from vlv.data.tars import headers, open_tar, plain_tar

BLOCK = tarfile.BLOCKSIZE
SHARD_BYTES = 1 << 30  # a shard that has grown beyond is followed by the next
HELD_BYTES = 1 << 28  # of images that wait for those before them; others are read again
END = bytes(2 * BLOCK)  # closes a tar file
DIGITS = 9  # of a sample's number, which is its name
MAX_NAME = 100 - len(".original")  # bytes of a member's name in a tar header
OWN = (".txt", ".json")  # of every sample
Members = dict[int, tuple[str, int]]  # by offset: name and size
SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II", ".tif"),
    (b"MM", ".tif"),
    (b"\x00\x00\x00\x0cjP", ".jp2"),
    (b"\xff\x4f\xff\x51", ".j2k"),
    (b"P", ".ppm"),
)  # the first bytes of a file


class WebDatasetSink(FolderSink):
    """Write a folder of shards."""

    journal_name = ".pending.jsonl"
    shard_bytes = SHARD_BYTES

    def _read(self) -> None:
        self._fd = -1  # of the shard that is being filled, self._shard
        self._turn: deque[Item] = deque()  # listed images whose samples are not written, in order
        self._queued: set[str] = set()  # their keys
        self._failed: set[str] = set()  # those of them that give no sample
        self._held = 0  # bytes of the images in _waiting
        self._shards: dict[str, Path] = {}  # by the input shard, "" for other images
        self._number = 0  # of the next sample that has no key from its input
        written = IdSet()
        for shard in self._shard_files():
            end = 0
            for found in self._read_shard(shard):
                written.add(_key(found.record))
                self._shards[_source(found.record.get("path", ""))] = shard
                self._number = max(self._number, int(found.key) + 1 if found.key.isdecimal() else 0)
                end = found.end
            with explained(shard):
                _close_at(shard, end)
        self._journal.drop(lambda record: _key(record) in written)
        super()._read()
        self._waiting = {_key(record): (record, None) for record in self._journal.records()}

    def _shard_files(self) -> list[Path]:
        return sorted(self.path.glob("*.tar"))

    def _finished_records(self) -> Iterator[tuple[dict, Path]]:
        for shard in self._shard_files():
            for found in self._read_shard(shard):
                yield found.record, shard
        yield from super()._finished_records()

    def _read_shard(self, shard: Path) -> Iterator[Sample]:
        with explained(shard):
            for found in samples(shard):
                if found is None:
                    raise SinkError(f"{shard} holds something that is no sample of a run: choose another -o")
                yield found

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        self._finish_shard()
        count = 0
        for shard in self._shard_files():
            found = list(self._read_shard(shard))
            kept = [one for one in found if not unwanted(one.record)]
            if not kept:
                with explained(shard):
                    shard.unlink()
            elif len(kept) < len(found):
                with explained(shard), atomic_write(shard) as file, open(file, "wb") as new, open(shard, "rb") as old:
                    for one in kept:
                        old.seek(one.start)
                        new.write(old.read(one.end - one.start))
                    new.write(END)
            count += len(found) - len(kept)
        return count + super().drop(unwanted)

    def is_finished(self, item: Item, size: int | None) -> bool:
        finished = super().is_finished(item, size)
        if not finished or item.key in self._waiting:
            self._queue(item)
        return finished

    def _queue(self, item: Item) -> None:
        if item.key not in self._queued:
            self._queued.add(item.key)
            self._turn.append(item)

    def caption(self, record: dict, item: Item) -> None:
        image = item.read()
        self._journal.write(record)
        held = image if self._held + len(image) <= HELD_BYTES else None
        self._held += len(held or b"")
        self._waiting[item.key] = record, held
        self._queue(item)
        self._write_next()

    def error(self, record: dict) -> None:
        super().error(record)
        if (key := _key(record)) in self._queued:
            self._failed.add(key)
            self._write_next()

    def _write_next(self) -> None:
        """Write the samples whose turn it is."""
        while self._turn:
            item = self._turn[0]
            if item.key in self._waiting:
                record, image = self._waiting[item.key]
                try:
                    self._write(record, item, item.read() if image is None else image)
                except ImageError as error:  # removed since it was captioned
                    super().error(error_record(item, error.kind, str(error)))
                del self._waiting[item.key]
                self._held -= len(image or b"")
            elif item.key not in self._failed:
                return
            self._failed.discard(item.key)
            self._queued.discard(item.key)
            self._turn.popleft()

    def _write(self, record: dict, item: Item, image: bytes) -> None:
        source = _source(item.path) if item.length is not None else ""
        shard = self._shards.get(source) or self._new_shard(source)
        if self._fd < 0 or shard != self._shard:
            self._open(shard)
        key, members = self._members(item) if source else ("", [])
        if not key:
            key, self._number = f"{self._number:0{DIGITS}}", self._number + 1
        with explained(shard):
            append(self._fd, sample(key, image, record, members))
            self._keys.add(key)
            full = not source and os.fstat(self._fd).st_size >= self.shard_bytes
        if full:
            self._finish_shard()
            del self._shards[source]

    def _members(self, item: Item) -> tuple[str, list[tuple[str, bytes | None]]]:
        """Return the key of an image in its shard, and the members of its sample: suffix, and content if not its own.

        The key is "" if another image has it, as of 7.jpg and 7.mask.png, or it is too long for a header.
        """
        members = _groups(item.path, stamp_of(item.path)).get(item.offset, {})
        if not members or max(len(os.fsencode(member)) for member, _ in members.values()) > MAX_NAME:
            return "", []
        key = _split(members[item.offset][0])[0]
        if key in self._keys:
            return "", []
        others = [offset for offset in members if offset != item.offset]
        contents = read_ranges([Range(plain_tar(item.path), offset, members[offset][1]) for offset in others])
        content = {item.offset: None, **dict(zip(others, contents, strict=True))}
        parts = []
        for offset, (name, _) in members.items():
            if not isinstance(content[offset], OSError):  # the end of a shard that was cut
                suffix = _split(name)[1]
                parts.append((f".original{suffix}" if suffix in OWN else suffix, content[offset]))
        return key, parts

    def _new_shard(self, source: str) -> Path:
        stem = os.path.basename(source).removesuffix(_ending(source)) if source else ""
        numbers = (f"{stem}-{n}" if stem else f"{n:06}" for n in itertools.count(2 if stem else 0))
        names = (self.path / f"{name}.tar" for name in itertools.chain([stem] if stem else [], numbers))
        self._shards[source] = next(shard for shard in names if not shard.exists())
        return self._shards[source]

    def _open(self, shard: Path) -> None:
        self._finish_shard()
        self._shard = shard
        self._keys = {found.key for found in self._read_shard(shard)} if shard.exists() else set()
        with explained(shard):
            self._fd = os.open(shard, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, max(0, os.fstat(self._fd).st_size - len(END)))

    def _finish_shard(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                with explained(self._shard):
                    append(fd, END)
            finally:
                os.close(fd)

    def close(self) -> None:
        try:
            self._write_next()
            self._finish_shard()
            self._journal.drop(lambda record: _key(record) not in self._waiting)
        finally:
            super().close()


def _key(record: dict) -> str:
    return key_of(record["id"], record.get("path"))


def _ending(path: str) -> str:
    """Return the ending of a shard's name, "" for other files."""
    return next((path[-len(ending) :] for ending in SHARDS if path.lower().endswith(ending)), "")


def _source(path: str) -> str:
    return path if _ending(path) else ""


def _split(name: str) -> tuple[str, str]:
    """Return the key of a member, as WebDataset takes it, and what follows."""
    folder, slash, base = name.rpartition("/")
    stem, dot, rest = base.partition(".")
    return folder + slash + stem, dot + rest


@functools.lru_cache(2)
def _groups(shard: str, stamp: tuple[int, int] | None) -> dict[int, Members]:
    """Return for each member of a shard, by its offset, those of its key. `stamp`: of the file, for the cache."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    with contextlib.suppress(OSError, ValueError, tarfile.TarError), open_tar(shard) as tar:  # up to the damage
        for member in headers(tar):
            if member.isreg() and not member.issparse():  # of equal names the last one counts
                groups.setdefault(_split(member.name)[0], {})[member.name] = member.offset_data, member.size
    by_offset = ({offset: (name, size) for name, (offset, size) in of_key.items()} for of_key in groups.values())
    return {offset: members for members in by_offset for offset in members}


def _close_at(shard: Path, end: int) -> None:
    """Cut off what a kill left after the last sample, and end the tar; remove one without samples."""
    if not end:
        shard.unlink()
    elif shard.stat().st_size != end + len(END):
        with open(shard, "r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(END)


@dataclass(frozen=True)
class Sample:
    """A complete sample of a shard: its key, where it starts and ends, and its record."""

    key: str
    start: int
    end: int
    record: dict


def samples(shard: Path) -> Iterator[Sample | None]:
    """Yield the complete samples of a shard, each ending with its record; None, at last, for what no run wrote."""
    size, start, key = shard.stat().st_size, 0, None
    with open(shard, "rb") as file:
        while len(header := file.read(BLOCK)) == BLOCK:
            if header.count(0) == BLOCK:
                if key is not None:  # members without a record, and yet the end
                    yield None
                return
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.TarError:
                yield None
                return
            this, ending = _split(member.name)
            if key not in (None, this):
                yield None
                return
            key, end = this, file.tell() + _padded(member.size)
            if end > size:
                return
            if ending == ".json":
                try:
                    record = json.loads(file.read(member.size))
                    record["id"], record["caption"]
                except (ValueError, KeyError, TypeError):
                    yield None
                    return
                yield Sample(key, start, end, record)
                key, start = None, end
            file.seek(end)


def sample(name: str, image: bytes, record: dict, members: list[tuple[str, bytes | None]] | None = None) -> bytes:
    """Return an image, its captions and its record as members of a tar file.

    `members`: those of the sample that the image comes from, by suffix; None stands for the image itself.
    """
    extension = os.path.splitext(record["id"])[1].lower() if is_image(record["id"]) else extension_of(image)
    text = lines(record).rstrip("\n").encode()
    parts = [(suffix, image if content is None else content) for suffix, content in members or [(extension, None)]]
    parts += zip(OWN, (text, json_bytes(record)), strict=True)
    return b"".join(_member(name + ending, content) for ending, content in parts)


def extension_of(image: bytes) -> str:
    """Return the extension for an image file's content, of those that vlv.data.image reads."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return ".webp"
    if optional := optional_format(image):
        return optional.extensions[0]
    if image[4:8] == b"ftyp":
        return ".avif"
    return next((extension for start, extension in SIGNATURES if image.startswith(start)), ".png")


def _member(name: str, data: bytes) -> bytes:
    """Return a member of a tar file: header, content, padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(_padded(len(data)) - len(data))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
