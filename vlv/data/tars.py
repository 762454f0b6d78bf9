"""WebDataset shards read at random, by an index of their members that is made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlv.common.files import atomic_write
from vlv.data.image import EXTENSIONS
from vlv.data.remote import DataError, is_url, need, open_file
from vlv.data.samples import Sample, text_of

# a member: (key, [image offset, length], [caption offset, length, suffix] or None)
Index = list[tuple[str, list, list | None]]


class Tars:
    """One shard a tar; members of one name before the first dot make a row, as WebDataset groups them.

    The index, a scan of all headers, is kept in $XDG_CACHE_HOME/vlv/tars by the file's name, size and date.
    """

    def __init__(self, files: list[str]):
        self.files = files
        with ThreadPoolExecutor(8) as pool:
            self._index: list[Index] = list(pool.map(_index, files))
        self.rows = [len(members) for members in self._index]

    def name(self, shard: int, row: int) -> str:
        return f"{self.files[shard]}/{self._index[shard][row][0]}"

    def read(self, shard: int, row: int) -> Sample:
        _, image, text = self._index[shard][row]
        with open_file(self.files[shard]) as stream:
            content = _part(stream, *image)
            known = text_of(text[2], _part(stream, *text[:2])) if text else ()
        return Sample(self.name(shard, row), content, *known)


def _part(stream, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)


def _index(file: str) -> Index:
    kept = _index_file(file)
    if kept.exists():
        return json.loads(kept.read_text())
    found = _scan(file)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept, shared=True) as file:
        file.write_text(json.dumps(found))
    return found


def _index_file(file: str) -> Path:
    if is_url(file):
        fs, path = need("fsspec", file).core.url_to_fs(file)
        about = fs.info(path)
        stamp = [file, about.get("size"), str(about.get("ETag") or about.get("LastModified") or about.get("mtime"))]
    else:
        status = os.stat(file)
        stamp = [os.path.abspath(file), status.st_size, status.st_mtime_ns]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlv" / "tars"
    return cache / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:24]}.json"


def _scan(file: str) -> Index:
    images: dict[str, list] = {}
    texts: dict[str, list] = {}
    try:
        with open_file(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                extension = "." + suffix.lower().rpartition(".")[2]
                if extension in EXTENSIONS:
                    images[key] = [member.offset_data, member.size]
                elif suffix == "json" or (suffix == "txt" and key not in texts):
                    texts[key] = [member.offset_data, member.size, extension]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{file} is no whole tar file ({error}): write it again") from error
    return [(key, where, texts.get(key)) for key, where in images.items()]
