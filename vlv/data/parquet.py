"""Parquet files read at random: a row group is read once for all rows that are due, and kept on the disk meanwhile.

Rows are shuffled within a window of row groups that fits KEPT_BYTES. All processes of a machine share the row groups
that one of them has read, in $XDG_CACHE_HOME/vlv/parquet, mapped into memory; the ones used longest ago go.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Sequence

from vlv.common.files import atomic_write
from vlv.data.remote import cache_folder, drop_old, file_stamp, is_url, need, open_ranged
from vlv.data.samples import ABOUT, CAPTION, IMAGE, WINDOW, Rows, Sample, check_image_key, row_sample

KEPT_BYTES = 4 << 30  # of row groups on the disk, three windows of them
OPEN = 64  # row groups mapped by one process
NESTED = ("struct<", "list<", "large_list<", "fixed_size_list<", "list_view<", "map<")  # types of columns
FOOTER = 65_536  # bytes read first at a remote file's end


class Parquet(Rows):
    """Every row group of every file is a shard; the image column holds bytes, or a struct with them."""

    def __init__(self, files: list[str], name: str, image_key: str | None = None):
        parquet = need("pyarrow.parquet", name)
        self.image_key = image_key
        self._groups: list[tuple[str, int]] = []
        self._metadata = {}
        self.rows = []
        size = 0
        for file in files:
            with open_ranged(file, FOOTER) as stream:
                metadata = parquet.ParquetFile(stream).metadata
            names = {metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)}
            check_image_key(names, image_key, file)
            self._metadata[file] = metadata
            self._groups += [(file, i) for i in range(metadata.num_row_groups)]
            self.rows += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            size += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            stamp = file_stamp(file) if is_url(file) else [os.path.abspath(file), os.stat(file).st_mtime_ns]
            self._metadata[file, "digest"] = hashlib.sha256(f"{stamp} {image_key}".encode()).hexdigest()[:24]
        # two windows at a time are in use where workers are ahead of one another
        self.window = max(1, min(WINDOW, int(KEPT_BYTES / 3 / max(1, size) * sum(self.rows))))
        self._keep()

    def _keep(self) -> None:
        self._table = functools.lru_cache(maxsize=OPEN)(self._open_group)
        self._texts = functools.lru_cache(maxsize=OPEN)(self._read_texts)

    def fingerprint(self) -> str:
        return str(list(dict.fromkeys(self._metadata[file, "digest"] for file, _ in self._groups)))

    def read_many(
        self, places: Sequence[tuple[int, int]], texts: bool = True, head: int | None = None
    ) -> list[Sample | Exception]:
        samples: list[Sample | Exception] = []
        for shard, row in places:
            try:
                table = self._texts(shard) if head == 0 else self._table(shard)
                values = table.slice(row, 1).to_pylist()[0]
                file, group = self._groups[shard]
                samples.append(row_sample(values, f"{file}#{group}:{row}", self.image_key))
            except (OSError, ValueError) as error:  # also pyarrow's of a damaged file
                samples.append(error)
        return samples

    def _open_group(self, shard: int):
        """Return a row group, mapped from the disk; read it where it is not there."""
        from pyarrow import feather

        file, group = self._groups[shard]
        kept = cache_folder("parquet") / self._metadata[file, "digest"] / f"{group}.arrow"
        kept.parent.mkdir(parents=True, exist_ok=True)
        with (kept.parent / f"{group}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process reads it, the others wait
            with contextlib.suppress(FileNotFoundError):
                os.utime(kept)
                return feather.read_table(kept, memory_map=True)
            table = self._read_group(file, group)
            with atomic_write(kept, shared=True) as temporary:
                feather.write_feather(table, temporary, compression="uncompressed")
            drop_old(cache_folder("parquet"), "*.arrow", KEPT_BYTES, kept)
            return feather.read_table(kept, memory_map=True)

    def _read_texts(self, shard: int):
        """Return a row group without its images."""
        return self._read_group(*self._groups[shard], images=False)

    def _read_group(self, file: str, group: int, images: bool = True):
        from pyarrow import parquet

        wanted = {*CAPTION, *ABOUT, "captions", "id"} | ({self.image_key, *IMAGE} if images else set())
        with open_ranged(file) as stream:
            opened = parquet.ParquetFile(stream, metadata=self._metadata[file], pre_buffer=True)
            return opened.read_row_group(group, [c for c in opened.schema_arrow.names if c in wanted])

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_table", "_texts")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._keep()


def image_column(schema, image_key: str | None = None) -> str | None:
    """Return the column of an Arrow schema that holds image files, as bytes or structs with bytes; None without one.

    `image_key` is the only column looked at; else IMAGE come first, then the first struct.
    """
    kinds = {field.name: str(field.type) for field in schema}
    struct = [field.name for field in schema if _has_bytes(field.type)]
    binary = [name for name, kind in kinds.items() if "binary" in kind and not kind.startswith(NESTED)]
    if image_key:
        return image_key if image_key in struct or image_key in binary else None
    return next((name for name in (*IMAGE, *struct) if name in binary or name in struct), None)


def _has_bytes(kind) -> bool:
    """Return True if an Arrow type is a struct with binary `bytes`."""
    return str(kind).startswith("struct<") and any(f.name == "bytes" and "binary" in str(f.type) for f in kind)
