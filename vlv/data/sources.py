"""Training data as shards of rows, read at random: folders, JSON lines, WebDataset tars, Parquet, HF datasets.

Paths are local or any URL that fsspec opens (s3://…, hf://…, simplecache::s3://… to keep whole shards on disk). Every
row has an id and an image file's bytes, and a caption where there is one: a .txt or .json beside an image (of the
same name, also within a tar), the `caption` of a JSON line (as vlv.train.distill and serve.vllm_caption write them),
or a column of that name. Images of no usable kind are found out when they are decoded, not here.
"""

from __future__ import annotations

import functools
import glob
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vlv.data.image import EXTENSIONS
from vlv.data.remote import DataError, is_url, need, open_file
from vlv.data.samples import ABOUT, CAPTION, IMAGE, Sample, Source, about, first_of, row_sample, text_of
from vlv.data.tars import Tars


def open_sources(paths: Sequence[str]) -> Source:
    """All the data that the arguments name. Raises DataError where one leads to nothing."""
    made: list[Source] = []
    for path in paths:
        files = [path] if path.startswith("hf:") and not path.startswith("hf://") else expand(path)
        for name, (matches, opener) in _KINDS.items():
            if chosen := [f for f in files if matches(f)]:
                made.append(opener(chosen, path))
                files = [f for f in files if f not in set(chosen)] if name != "folder" else []
        if files:
            raise DataError(f"{files[0]}: expected a folder, .tar, .parquet, .jsonl or hf:NAME")
    source = made[0] if len(made) == 1 else Joined(made)
    if not sum(source.rows):
        raise DataError(f"no rows in {', '.join(paths)}")
    return source


def expand(path: str) -> list[str]:
    """The shards of a folder that has any, else the folder itself; the files of a glob; a file."""
    if is_url(path):
        fsspec = need("fsspec", path)
        if "*" in path:
            return [f.full_name if hasattr(f, "full_name") else f.path for f in fsspec.open_files(path)]
        return [path]
    if os.path.isdir(path):
        if (Path(path) / "dataset_info.json").is_file():
            return [f"hf:{path}"]
        shards = sorted(str(f) for f in Path(path).rglob("*") if f.suffix in (".tar", ".parquet"))
        return shards or [path]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    if not found or not os.path.exists(found[0]):
        raise DataError(f"no such file or folder: {path}")
    return found


class Files:
    """Image files, one shard. What is known of each: caption and about, or the text file beside it."""

    def __init__(self, files: list[str], known: list[tuple[str | None, dict]] | list[str | None], ids: list[str]):
        self.files, self.known, self.ids, self.rows = files, known, ids, [len(files)]

    @classmethod
    def of_folder(cls, files: list[str], name: str) -> Files:
        """The images of a folder and those below it, by name."""
        if is_url(name):
            fs, root = need("fsspec", name).core.url_to_fs(name)
            names = [fs.unstrip_protocol(f) for f in fs.find(root)]
        else:
            names = [os.path.join(d, f) for top in files for d, _, inner in os.walk(top) for f in inner]
        texts = {f for f in names if f.endswith((".txt", ".json"))}
        found = sorted(f for f in names if os.path.splitext(f)[1].lower() in EXTENSIONS)
        beside = ([os.path.splitext(f)[0] + kind for kind in (".json", ".txt")] for f in found)
        return cls(found, [next((t for t in both if t in texts), None) for both in beside], found)

    @classmethod
    def of_lines(cls, files: list[str], name: str) -> Files:
        """JSON lines with a path (or an id that is one), relative to the file's folder, and a caption."""
        paths, known, ids = [], [], []
        for file in files:
            folder = os.path.dirname(file) or "."
            with open_file(file) as stream:
                for number, line in enumerate(stream, 1):
                    try:
                        record = json.loads(line)
                        path = record.get("path") or record["id"]
                        paths.append(path if is_url(path) or os.path.isabs(path) else f"{folder}/{path}")
                    except (ValueError, KeyError, AttributeError, TypeError) as error:
                        raise DataError(
                            f"{file}, line {number}: expected a JSON object with a path, or an id that is one"
                        ) from error
                    known.append((first_of(record, CAPTION), about(record)))
                    ids.append(str(first_of(record, ("id", "path"))))
        return cls(paths, known, ids)

    def name(self, shard: int, row: int) -> str:
        return self.ids[row]

    def read(self, shard: int, row: int) -> Sample:
        with open_file(self.files[row]) as stream:
            image = stream.read()
        known = self.known[row]
        if isinstance(known, str):
            with open_file(known) as stream:
                known = text_of(known, stream.read())
        return Sample(self.ids[row], image, *(known or ()))


class Parquet:
    """Every row group of every file is a shard; the image column holds bytes, or a struct with them."""

    def __init__(self, files: list[str], name: str):
        parquet = need("pyarrow.parquet", name)
        self._groups: list[tuple[str, int]] = []
        self.rows = []
        for file in files:
            with open_file(file) as stream:
                metadata = parquet.ParquetFile(stream).metadata
                names = {metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)}
                if not names & set(IMAGE):
                    raise DataError(f"{file} has the columns {sorted(names)}, none of {', '.join(IMAGE)}")
                self._groups += [(file, i) for i in range(metadata.num_row_groups)]
                self.rows += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._table = functools.lru_cache(maxsize=2)(self._read_group)

    def _read_group(self, shard: int):
        from pyarrow import parquet

        file, group = self._groups[shard]
        with open_file(file) as stream:
            opened = parquet.ParquetFile(stream)
            columns = [c for c in opened.schema_arrow.names if c in (*IMAGE, *CAPTION, *ABOUT, "id")]
            return opened.read_row_group(group, columns)

    def name(self, shard: int, row: int) -> None:
        return None

    def read(self, shard: int, row: int) -> Sample:
        values = {name: column[row].as_py() for name, column in zip(*self._columns(shard), strict=True)}
        file, group = self._groups[shard]
        return row_sample(values, f"{file}#{group}:{row}")

    def _columns(self, shard: int):
        table = self._table(shard)
        return table.column_names, table.columns

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_table"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._table = functools.lru_cache(maxsize=2)(self._read_group)


class HuggingFace:
    """A dataset of the `datasets` library: hf:NAME or hf:NAME:SPLIT from the hub, or a folder of save_to_disk."""

    def __init__(self, names: list[str], name: str):
        datasets = need("datasets", name)
        self._name, parts = name, [n.removeprefix("hf:") for n in names]
        loaded = [self._load(datasets, part) for part in parts]
        self._data = [self._undecoded(datasets, one, name) for one in loaded]
        self.rows = [len(one) for one in self._data]

    @staticmethod
    def _load(datasets, part: str):
        if os.path.isdir(part):
            return datasets.load_from_disk(part)
        name, _, split = part.partition(":")
        return datasets.load_dataset(name, split=split or "train")

    @staticmethod
    def _undecoded(datasets, data, name: str):
        column = next((c for c in IMAGE if c in data.column_names), None)
        if column is None:
            raise DataError(f"{name} has the columns {data.column_names}, none of {', '.join(IMAGE)}")
        if isinstance(data.features[column], datasets.Image):  # as the file's bytes, for our own decoder
            data = data.cast_column(column, datasets.Image(decode=False))
        return data

    def name(self, shard: int, row: int) -> None:
        return None

    def read(self, shard: int, row: int) -> Sample:
        return row_sample(self._data[shard][row], f"{self._name}#{shard}:{row}")


class Joined:
    """Several sources as one."""

    def __init__(self, parts: list[Source]):
        self._parts = parts
        self._where = [(part, i) for part in parts for i in range(len(part.rows))]
        self.rows = [n for part in parts for n in part.rows]

    def name(self, shard: int, row: int) -> str | None:
        part, inner = self._where[shard]
        return part.name(inner, row)

    def read(self, shard: int, row: int) -> Sample:
        part, inner = self._where[shard]
        return part.read(inner, row)


_KINDS: dict[str, tuple[Callable[[str], bool], Callable[[list[str], str], Source]]] = {
    "hf": (lambda f: f.startswith("hf:") and not f.startswith("hf://"), HuggingFace),
    "tar": (lambda f: f.endswith(".tar"), lambda files, name: Tars(files)),
    "parquet": (lambda f: f.endswith(".parquet"), Parquet),
    "lines": (lambda f: f.endswith(".jsonl"), Files.of_lines),
    "folder": (lambda f: os.path.isdir(f) or (is_url(f) and not os.path.splitext(f)[1]), Files.of_folder),
}
