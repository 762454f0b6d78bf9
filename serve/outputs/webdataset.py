"""Write WebDataset shards: image, caption and record beside each other in tar files, appended sample by sample.

    000000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.png  ...

The tars are the record of the run: a sample is appended in one write, and a last one that a kill tore is cut off.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from serve.core.inputs import Item
from serve.outputs.jsonl import FolderSink, SinkError, append, explained, json_bytes
from serve.outputs.text import lines
from vlv.common.files import atomic_write
from vlv.data.decoding.optional import optional_format
from vlv.data.image_files import is_image

BLOCK = tarfile.BLOCKSIZE
SHARD_BYTES = 1 << 30  # a shard that has grown beyond is followed by the next
END = bytes(2 * BLOCK)  # closes a tar file
DIGITS = 9  # of a sample's number, which is its name
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
    """Write a folder of shards; `_lock.jsonl` in it stays empty and keeps a second run out."""

    journal_name = "_lock.jsonl"
    shard_bytes = SHARD_BYTES
    _fd = -1  # of the shard that is being filled

    def _read(self) -> None:
        self._end, self._samples = 0, 0
        super()._read()
        if self.changed:  # the shards are others now
            for _ in self._finished_records():
                pass
        shards = self._shard_files()
        self._shards = len(shards)
        if shards:  # only the last can be unfinished
            self._open(shards[-1])
            with explained(shards[-1]):
                os.ftruncate(self._fd, self._end)

    def _shard_files(self) -> list[Path]:
        return sorted(self.path.glob("[0-9]*.tar"))

    def _finished_records(self) -> Iterator[tuple[dict, Path]]:
        self._samples = 0
        for shard in self._shard_files():
            self._end = 0
            for found in self._read_shard(shard):
                self._samples, self._end = found.number + 1, found.end
                yield found.record, shard

    def _read_shard(self, shard: Path) -> Iterator[Sample]:
        with explained(shard):
            for found in samples(shard):
                if found is None:
                    raise SinkError(f"{shard} holds something that is no sample of a run: choose another -o")
                yield found

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        self._finish_shard()  # at the end of a run; what would follow goes into the next shard
        count = 0
        for shard in self._shard_files():
            found = list(self._read_shard(shard))
            kept = [one for one in found if not unwanted(one.record)]
            if len(kept) < len(found):
                with explained(shard), atomic_write(shard) as file, open(file, "wb") as new, open(shard, "rb") as old:
                    for one in kept:
                        old.seek(one.start)
                        new.write(old.read(one.end - one.start))
                    new.write(END)
                count += len(found) - len(kept)
        return count + super().drop(unwanted)

    def caption(self, record: dict, item: Item) -> None:
        data = sample(f"{self._samples:0{DIGITS}}", item.read(), record)
        if self._fd < 0:
            self._open(self.path / f"{self._shards:06}.tar")
            self._shards += 1
        with explained(self._shard):
            append(self._fd, data)
            full = os.fstat(self._fd).st_size >= self.shard_bytes
        self._samples += 1
        if full:
            self._finish_shard()

    def _open(self, shard: Path) -> None:
        self._shard = shard
        with explained(shard):
            self._fd = os.open(shard, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

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
            self._finish_shard()
        finally:
            super().close()


@dataclass(frozen=True)
class Sample:
    """A complete sample of a shard: its number, where it starts and ends, and its record."""

    number: int
    start: int
    end: int
    record: dict


def samples(shard: Path) -> Iterator[Sample | None]:
    """Yield the complete samples of a shard, whose numbers grow; None, at last, for something that no run wrote."""
    size, number, start = shard.stat().st_size, -1, 0
    with open(shard, "rb") as file:
        while len(header := file.read(BLOCK)) == BLOCK and header.count(0) < BLOCK:
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.TarError, UnicodeDecodeError):
                member = None
            digits, _, ending = member.name.partition(".") if member else ("", "", "")
            if member is None or len(digits) != DIGITS or not digits.isdecimal() or int(digits) <= number:
                yield None
                return
            end = file.tell() + _padded(member.size)
            if end > size:
                return
            if ending == "json":
                try:
                    record = json.loads(file.read(member.size))
                    record["id"]
                except (ValueError, KeyError, TypeError):
                    yield None
                    return
                yield Sample(int(digits), start, end, record)
                number, start = int(digits), end
            file.seek(end)


def sample(name: str, image: bytes, record: dict) -> bytes:
    """Return an image, its captions and its record as three members of a tar file."""
    extension = os.path.splitext(record["id"])[1].lower() if is_image(record["id"]) else extension_of(image)
    text = lines(record).rstrip("\n").encode()
    parts = {extension: image, ".txt": text, ".json": json_bytes(record)}
    return b"".join(_member(name + ending, content) for ending, content in parts.items())


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
