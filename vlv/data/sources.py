"""Training data as shards of rows, read at random: folders, JSON lines, CSV, WebDataset tars, Parquet, HF datasets.

Paths are local or any URL that fsspec opens (s3://…, hf://…, simplecache::s3://… to keep whole shards on disk). Every
row has an id and an image file's bytes, and a caption where there is one: a .txt or .json beside an image (of the
same name, also within a tar), the `caption` of a JSON line (as vlv.train.distill and serve.vllm_caption write them),
or a column of that name. Images of no usable kind are found out when they are decoded, not here.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vlv.common.command import one_line
from vlv.data.image_files import is_image, numbered_paths
from vlv.data.parquet import Parquet
from vlv.data.remote import DataError, Range, is_url, list_files, need, not_found, read_ranges
from vlv.data.samples import (
    IMAGE,
    PATH,
    Rows,
    Sample,
    Source,
    about,
    captions_of,
    check_image_key,
    described,
    first_of,
    row_sample,
    table_records,
)
from vlv.data.tars import ENDINGS, TEXTS, Tars, image_and_text_members, plain_tar


def open_sources(paths: Sequence[str], image_key: str | None = None) -> Source:
    """Open all the data that the arguments name. Raises DataError where one leads to nothing.

    `image_key`: the column of the images, or their ending in a tar, where it is not the usual one.
    """
    made: list[Source] = []
    for path in itertools.chain.from_iterable(map(numbered_paths, paths)):
        files = [path] if path.startswith("hf:") and not path.startswith("hf://") else expand(path)
        for name, (matches, opener) in _KINDS.items():
            if chosen := [f for f in files if matches(f)]:
                made.append(opener(chosen, path, image_key))
                files = [f for f in files if f not in set(chosen)] if name != "folder" else []
        if files:
            raise DataError(f"{files[0]}: expected a folder, .tar, .parquet, .jsonl, .csv or hf:NAME")
    source = made[0] if len(made) == 1 else Joined(made)
    if not sum(source.rows):
        raise DataError(f"no rows in {', '.join(paths)}")
    return source


def expand(path: str) -> list[str]:
    """Return the shards of a folder that has any, else the folder itself; the files of a glob; a file."""
    if is_url(path):
        if "*" in path and "::" in path:  # through a cache, which the names have to keep
            return [f.full_name if hasattr(f, "full_name") else f.path for f in need("fsspec", path).open_files(path)]
        if "*" in path:
            return list_files(path)
        inside = list_files(path) if _is_folder(path) and "::" not in path else []
        return [f for f in inside if f.endswith((*ENDINGS, ".parquet"))] or [path]
    if os.path.isdir(path):
        if (Path(path) / "dataset_info.json").is_file():
            return [f"hf:{path}"]
        shards = sorted(str(f) for f in Path(path).rglob("*") if f.name.endswith((*ENDINGS, ".parquet")))
        return shards or [path]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    if not found or not os.path.exists(found[0]):
        raise DataError(f"no such file or folder: {path}")
    return found


class Files(Rows):
    """Image files, or parts of files, as one shard, with what is known of each.

    `texts` are the files beside an image that may hold its caption; `known` is what a record tells of it.
    """

    def __init__(self, images: list[Range], ids: list[str], texts: list[list[str]], known: list[dict]):
        self.images = images
        self.ids = ids
        self.texts = texts
        self.known = known
        self.rows = [len(images)]

    @classmethod
    def of_folder(cls, files: list[str], name: str, image_key: str | None = None) -> Files:
        """List the images of a folder and those below it, by name."""
        if is_url(name):
            names = list_files(name)
        else:
            names = [os.path.join(d, f) for top in files for d, _, inner in os.walk(top) for f in inner]
        there = {f for f in names if f.endswith(TEXTS)}
        found = sorted(f for f in names if is_image(f))
        texts = [[t for t in (os.path.splitext(f)[0] + kind for kind in TEXTS) if t in there] for f in found]
        return cls([Range(f) for f in found], found, texts, [{}] * len(found))

    @classmethod
    def of_lines(cls, files: list[str], name: str, image_key: str | None = None) -> Files:
        """Read JSON lines or CSV with a path (or file_name or id), relative to the file's folder, and a caption.

        The record of a tar's member, as serve.vllm_caption writes it, has the tar as its path and its id ends with
        the tar's name and the member's.
        """
        images, known, ids = [], [], []
        members = functools.cache(lambda tar: {n: (o, size) for n, o, size in image_and_text_members(tar)})
        for file in files:
            folder = os.path.dirname(file) or "."
            for number, record in table_records(file):
                where = f"{file}, line {number}"
                path = next((record[name] for name in PATH if record.get(name)), None)
                if not isinstance(path, str):
                    raise DataError(f"{where}: expected a JSON object with a path, or an id that is one")
                path = path if is_url(path) or os.path.isabs(path) else f"{folder}/{path}"
                id = str(first_of(record, ("id", *PATH)))
                images.append(_member(path, id, members, where) if path.endswith(ENDINGS) else Range(path))
                captions = captions_of(record)
                several = captions if len(captions) > 1 else ()
                known.append({
                    "caption": captions[0] if captions else None, "captions": several, "about": about(record)
                })  # fmt: skip
                ids.append(id)
        return cls(images, ids, [[]] * len(images), known)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.ids, self.known]).encode())
        for part, texts in zip(self.images, self.texts, strict=True):
            for path in (part.path, *texts):
                with contextlib.suppress(OSError):
                    status = None if is_url(path) else os.stat(path)
                    digest.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}".encode())
        return digest.hexdigest()

    def name(self, shard: int, row: int) -> str:
        return self.ids[row]

    def read_many(
        self, places: Sequence[tuple[int, int]], texts: bool = True, head: int | None = None
    ) -> list[Sample | Exception]:
        beside = [self.texts[row] if texts else [] for _, row in places]
        ranges = [part for (_, row), more in zip(places, beside, strict=True) for part in
                  (_head(self.images[row], head), *map(Range, more))]  # fmt: skip
        contents = iter(read_ranges(ranges))
        samples: list[Sample | Exception] = []
        for (_, row), more in zip(places, beside, strict=True):
            image, found = next(contents), [(name, next(contents)) for name in more]
            known = self.known[row] or described(found)
            samples.append(image if isinstance(image, Exception) else Sample(self.ids[row], image, **known))
        return samples


def _is_folder(path: str) -> bool:
    """Return True for a URL whose name has no ending."""
    return is_url(path) and not os.path.splitext(path)[1]


def _head(part: Range, length: int | None) -> Range:
    if length is None:
        return part
    return replace(part, length=length if part.length is None else min(length, part.length), up_to=True)


def _member(tar: str, id: str, members: Callable, where: str) -> Range:
    """Return where a tar's member lies that a record is about. Raises DataError where there is none of its name."""
    _, _, name = id.partition(f"{os.path.basename(tar)}/")
    try:
        return Range(plain_tar(tar), *members(tar)[name])
    except (OSError, KeyError) as error:
        raise DataError(f"{where}: expected an id that ends with the name of a member of {tar}, got {id!r}") from error


class HuggingFace(Rows):
    """A dataset of the `datasets` library: hf:NAME or hf:NAME:SPLIT from the hub, or a folder of save_to_disk."""

    def __init__(self, names: list[str], name: str, image_key: str | None = None):
        datasets = need("datasets", name)
        self._name, self.image_key = name, image_key
        loaded = [self._load(datasets, n.removeprefix("hf:")) for n in names]
        self._data = [self._undecoded(datasets, one, name, image_key) for one in loaded]
        self.rows = [len(one) for one in self._data]

    @staticmethod
    def _load(datasets, part: str):
        name, _, split = part.partition(":")
        try:
            if os.path.isdir(part):
                return datasets.load_from_disk(part)
            return datasets.load_dataset(name, split=split or "train")
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(not_found(f"hf:{name}", error)) from error
        except Exception as error:  # the library and those below it have no common class of errors
            raise DataError(f"hf:{part} cannot be opened: {one_line(error)}") from error

    @staticmethod
    def _undecoded(datasets, data, name: str, image_key: str | None):
        check_image_key(data.column_names, image_key, name)
        column = image_key or next(c for c in IMAGE if c in data.column_names)
        if isinstance(data.features[column], datasets.Image):  # as the file's bytes, for our own decoder
            data = data.cast_column(column, datasets.Image(decode=False))
        return data

    def fingerprint(self) -> str:
        return str([data._fingerprint for data in self._data])

    def read(self, shard: int, row: int) -> Sample:
        return row_sample(self._data[shard][row], f"{self._name}#{shard}:{row}", self.image_key)


class Joined(Rows):
    """Several sources as one."""

    def __init__(self, parts: list[Source]):
        self._parts = parts
        self._where = [(part, i) for part in parts for i in range(len(part.rows))]
        self.rows = [n for part in parts for n in part.rows]
        self.window = min(part.window for part in parts)
        self.notes = [note for part in parts for note in part.notes]

    def fingerprint(self) -> str:
        return str([part.fingerprint() for part in self._parts])

    def name(self, shard: int, row: int) -> str | None:
        part, inner = self._where[shard]
        return part.name(inner, row)

    def read_many(
        self, places: Sequence[tuple[int, int]], texts: bool = True, head: int | None = None
    ) -> list[Sample | Exception]:
        found: list[Sample | Exception | None] = [None] * len(places)
        for part in self._parts:
            chosen = [i for i, (shard, _) in enumerate(places) if self._where[shard][0] is part]
            inner = [(self._where[places[i][0]][1], places[i][1]) for i in chosen]
            for i, sample in zip(chosen, part.read_many(inner, texts, head) if inner else [], strict=True):
                found[i] = sample
        return found


_KINDS: dict[str, tuple[Callable[[str], bool], Callable[[list[str], str, str | None], Source]]] = {
    "hf": (lambda f: f.startswith("hf:") and not f.startswith("hf://"), HuggingFace),
    "tar": (lambda f: f.endswith(ENDINGS), lambda files, name, image_key: Tars(files, image_key)),
    "parquet": (lambda f: f.endswith(".parquet"), Parquet),
    "lines": (lambda f: f.endswith((".jsonl", ".csv")), Files.of_lines),
    "folder": (lambda f: os.path.isdir(f) or _is_folder(f), Files.of_folder),
}
