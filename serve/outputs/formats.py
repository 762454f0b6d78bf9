"""Write captions as text files, COCO or Parquet, all with FileSink's interface.

Each class names its commit point: at whatever moment a kill -9 comes, an image is either finished or not, and the next
run completes what the commit implies.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from serve.core.id_set import IdSet
from serve.core.inputs import Item
from serve.outputs.jsonl import FileSink, FolderSink, SinkError, captions_of, explained, json_bytes
from serve.outputs.text import lines
from vlv.common.files import atomic_write
from vlv.data.image import ImageError

ROWS = 10_000  # captions in one Parquet part
IDENTITY = ("id", "path", "model", "flags", "bytes", "mtime_ns", "sha256")  # columns that a later run reads
COCO_HEAD = b'{"info": {"description": "VLV captions'


class SidecarSink(FileSink):
    """Write `photo.txt` beside `photo.jpg`, as trainers of image models read them, and the records to `path`.

    The record is the commit point; the next run writes the text files that are not there. A text file that exists and
    is not from this output stays as it is, and the image is an error of kind `exists`.
    """

    def _start_over(self) -> None:
        for record in self._journal.records():
            _remove(record)
        super()._start_over()

    def _read(self) -> None:
        self._written = IdSet()  # the text files of this output
        super()._read()
        for record in self._journal.records():
            text = sidecar(record["path"])
            self._written.add(str(text))
            if not text.exists() and os.path.exists(record["path"]):
                self._write(record)

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        for record in self._journal.records():
            if unwanted(record):
                _remove(record)
        return super().drop(unwanted)

    def patch(self, edits: dict[str, dict]) -> int:
        for record in self._journal.records():
            if record["id"] in edits:
                _remove(record)
        count = super().patch(edits)
        for record in self._journal.records():
            if record["id"] in edits and not sidecar(record["path"]).exists():
                self._write(record)
        return count

    def caption(self, record: dict, item: Item) -> None:
        text = sidecar(item.path)
        if "://" in item.path:
            raise ImageError("format", "an image behind a URL has no place for a .txt: use another --format")
        if not item.is_file:
            raise ImageError("format", "an image inside a shard has no place for a .txt: use --format webdataset")
        if str(text) in self._written:
            raise ImageError(
                "exists",
                f"{text} has the caption of another image of this output, whose name differs in its ending only: "
                "rename one of them, or use --format jsonl",
            )
        if text.exists():
            raise ImageError("exists", f"{text} is there already, and not from this run: move it away")
        super().caption(record, item)
        self._written.add(str(text))
        self._write(record)

    def _write(self, record: dict) -> None:
        text = sidecar(record["path"])
        with explained(text), atomic_write(text) as file:
            file.write_text(lines(record), encoding="utf-8")


def _remove(record: dict) -> None:
    """Remove the text file of a record, unless somebody has changed it since."""
    text = sidecar(record["path"])
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text.read_text(encoding="utf-8") == lines(record):
            text.unlink()


def sidecar(image: str) -> Path:
    """Return the text file of an image file."""
    return Path(image).with_suffix(".txt")


class DerivedSink(FileSink):
    """Write one file from the records when a run ends; they are kept in a journal beside it, the commit point."""

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.journal_path.exists():
            raise SinkError(f"{self.path} is there already, without its {self.journal_path.name}: choose another -o")

    def close(self) -> None:
        try:
            with explained(self.path), atomic_write(self.path) as path, open(path, "wb") as file:
                self.write(file)
        finally:
            super().close()

    def write(self, file: BinaryIO) -> None:
        """Write the file's content. Raises SinkError."""
        raise NotImplementedError


class CocoSink(DerivedSink):
    """Write COCO's captions JSON (`images`, `annotations`) from `NAME.jsonl` beside it.

    Ids are numbers in the order of its lines, so that a resumed run keeps them.
    """

    @property
    def journal_path(self) -> Path:
        return self.path.with_suffix(".jsonl")

    def _refuse_foreign(self) -> None:
        if self.path.suffix == ".jsonl":
            raise SinkError(f"--format coco writes one JSON file: -o {self.path.with_suffix('.json')}")
        with explained(self.path), contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            if file.read(len(COCO_HEAD)) != COCO_HEAD:
                raise SinkError(f"{self.path} is there already, and not from a run: choose another -o")
        super()._refuse_foreign()

    def write(self, file: BinaryIO) -> None:
        file.write(COCO_HEAD + b', model %s"}, ' % self.model.encode())
        file.write(b'"images": [')
        file.writelines(_joined(self._images()))
        file.write(b'\n], "annotations": [')
        file.writelines(_joined(self._annotations()))
        file.write(b"\n]}\n")

    def _images(self) -> Iterator[dict]:
        for number, record in enumerate(self._journal.records(), 1):
            yield {"id": number, "file_name": record["id"]}

    def _annotations(self) -> Iterator[dict]:
        count = itertools.count(1)
        for image, record in enumerate(self._journal.records(), 1):
            for caption in captions_of(record):
                yield {"id": next(count), "image_id": image, "caption": caption}


class ImageFolderSink(DerivedSink):
    """Write `metadata.jsonl` among the images, as datasets.load_dataset("imagefolder") reads it."""

    @property
    def journal_path(self) -> Path:
        return self.path.with_name(f".{self.path.stem}.records.jsonl")  # hidden from readers of the folder

    def caption(self, record: dict, item: Item) -> None:
        self._name(record, item)
        super().caption(record, item)

    def _name(self, record: dict, item: Item | None = None) -> str:
        """Return the image's path below the folder. Raises ImageError for an image that is elsewhere."""
        name = os.path.relpath(record["path"], self.path.parent)
        if name.startswith("..") or "://" in record["path"] or (item and not item.is_file):
            raise ImageError("format", f"not a file below {self.path.parent.absolute()}, the folder of -o")
        return name

    def write(self, file: BinaryIO) -> None:
        for record in self._journal.records():
            texts = captions_of(record)
            more = {"captions": texts} if len(texts) > 1 else {}
            file.write(json_bytes({"file_name": self._name(record), "text": texts[0], **more}) + b"\n")


class KohyaSink(DerivedSink):
    """Write the JSON of sd-scripts (`in_json`): a caption for the path of each image."""

    @property
    def journal_path(self) -> Path:
        return self.path.with_suffix(".records.jsonl")

    def write(self, file: BinaryIO) -> None:
        file.write(b"{")
        for number, record in enumerate(self._journal.records()):
            line = json_bytes({record["path"]: {"caption": captions_of(record)[0]}})
            file.write((b",\n" if number else b"\n") + line[1:-1])
        file.write(b"\n}\n")

    def caption(self, record: dict, item: Item) -> None:
        if item.length is not None or item.row is not None:
            raise ImageError("format", "an image inside a shard has no path of its own: use --format webdataset")
        super().caption(record, item)


def _joined(records: Iterator[dict]) -> Iterator[bytes]:
    for number, record in enumerate(records):
        yield (b",\n" if number else b"\n") + json_bytes(record)


class ParquetSink(FolderSink):
    """Write a folder of complete Parquet parts; later records wait in `.pending.jsonl`, which readers skip.

    The pending line is the commit point. A part appears by one rename; only then its lines are dropped, and a run
    that was killed in between finds their ids in the part.
    """

    journal_name = ".pending.jsonl"
    suffix = ".parquet"
    rows = ROWS

    def _read(self) -> None:
        self._next = 1 + max((int(part.stem.partition("-")[2]) for part in self._parts()), default=-1)
        sealed = IdSet()  # a run that was killed between a part and its lines leaves both
        for part in self._parts():
            with explained(part):
                for record in self.read_part(part):
                    sealed.add(record["id"])
        self._journal.drop(lambda record: record["id"] in sealed)
        super()._read()
        self._pending = sum(1 for _ in self._journal.records())

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*" + self.suffix))

    def _finished_records(self) -> Iterator[tuple[dict, Path]]:
        for part in self._parts():
            with explained(part):
                for record in self.read_part(part):
                    yield record, part
        yield from super()._finished_records()

    def drop(self, unwanted: Callable[[dict], bool]) -> int:
        count = 0
        for part in self._parts():
            with explained(part):
                found = {record["id"] for record in self.read_part(part) if unwanted(record)}
                if found:
                    with atomic_write(part) as file:
                        self.drop_rows(part, file, found)
            count += len(found)
        count += super().drop(unwanted)
        self._pending = sum(1 for _ in self._journal.records())
        return count

    def caption(self, record: dict, item: Item) -> None:
        try:
            f"{record['id']}{record['path']}".encode()
        except UnicodeEncodeError as error:
            raise ImageError("name", "the name is not UTF-8, as Parquet wants it: rename the file") from error
        super().caption(record, item)
        self._pending += 1
        if self._pending >= self.rows:
            self._seal()

    def _seal(self) -> None:
        """Write the pending lines as a part."""
        part = self.path / f"part-{self._next:05}{self.suffix}"
        with explained(part), atomic_write(part) as file:
            self.write_part(file, list(self._journal.records()))
        self._journal.clear()
        self._next, self._pending = self._next + 1, 0

    def close(self) -> None:
        try:
            if self._pending:
                self._seal()
        finally:
            super().close()

    def write_part(self, file: Path, records: list[dict]) -> None:
        """Write records as one Parquet file."""
        import pyarrow as pa
        from pyarrow import parquet

        rows = [{**r, "captions": captions_of(r), **_seconds(r)} for r in records]
        text = pa.string()
        number = pa.float64()
        fields = {"id": text, "path": text, "caption": text, "captions": pa.list_(text), "tokens": pa.int32()}
        fields |= {"finish_reason": text, "encode_seconds": number, "llm_seconds": number, "model": text, "flags": text}
        fields |= {"bytes": pa.int64(), "mtime_ns": pa.int64(), "sha256": text}
        if any("crop" in record for record in records):
            square = pa.struct({"box": pa.list_(pa.int32()), "caption": text, "captions": pa.list_(text)})
            fields |= {"crop": text, "tiles": pa.list_(square)}
        table = pa.Table.from_pylist(rows, pa.schema(fields.items()))
        parquet.write_table(table, file, compression="zstd")

    def drop_rows(self, part: Path, file: Path, ids: set[str]) -> None:
        """Write the rows of a part without those of the given ids."""
        import pyarrow as pa
        from pyarrow import parquet

        table = parquet.read_table(part)
        kept = pa.array([row not in ids for row in table["id"].to_pylist()])
        parquet.write_table(table.filter(kept), file, compression="zstd")

    def read_part(self, file: Path) -> Iterator[dict]:
        """Yield what identifies every row; parts of earlier versions lack some columns."""
        from pyarrow import parquet

        try:
            part = parquet.ParquetFile(file)
        except ValueError as error:  # pyarrow's
            raise SinkError(
                f"{file} is not a complete Parquet file: move it away, and run the command again"
            ) from error
        columns = [name for name in IDENTITY if name in part.schema_arrow.names]
        for batch in part.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _seconds(record: dict) -> dict:
    return {f"{stage}_seconds": seconds for stage, seconds in record.get("timings", {}).items()}
