"""The output folder of serve.ray_batch: its plan, and the parts that tell which units of the plan are done.

    _plan/000000.json ...    the images of each unit, written before anything is captioned
    _plan/complete.json      the plan's terms; without it the plan is made again
    part-000000.parquet      a unit's captions, written atomically: the unit is done when it exists
    errors/part-000000.parquet    a unit's images that failed, written before its captions

A unit that is done twice, because a worker died between its part and its report, writes the same file again. So
nothing is lost or doubled, whatever is killed, on a local disk as on S3 or GCS (through fsspec).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from serve.core.id_set import IdSet
from serve.core.inputs import Item, file_system
from vlv.common.command import Misuse
from vlv.common.files import atomic_write


class Store:
    """A folder, local or behind a URL, whose files are written atomically."""

    def __init__(self, url: str):
        """Raises Misuse if fsspec has no file system for the URL."""
        self._fs, self._root = file_system(url)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        path = f"{self._root}/{name}"
        if "file" in self._fs.protocol:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with atomic_write(Path(path), shared=True) as file:
                file.write_bytes(content)
        else:  # an object store shows an object once it is complete
            self._fs.pipe_file(path, content)

    def remove(self, name: str) -> None:
        """Remove a file if there is one."""
        path = f"{self._root}/{name}"
        if self._fs.exists(path):
            self._fs.rm_file(path)

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError."""
        return self._fs.cat_file(f"{self._root}/{name}")

    def names(self, suffix: str) -> set[str]:
        """Return the names at the top of the folder that end with `suffix`."""
        if not self._fs.exists(self._root):
            return set()
        self._fs.invalidate_cache()
        found = {path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
        return {name for name in found if name.endswith(suffix)}


def part(unit: int, ending: str = "") -> str:
    """Return the name of a unit's part."""
    return f"part-{unit:06}{ending}"


def plan(store: Store, items: Iterable[Item], terms: dict, size: int) -> int:
    """Write the plan unless it is there; return the number of units. Raises Misuse if it has other terms."""
    try:
        held = json.loads(store.read("_plan/complete.json"))
    except FileNotFoundError:
        pass
    else:
        # a plan of an earlier version has no flags
        if changed := sorted(name for name in terms if held.get(name, terms[name]) != terms[name]):
            name, before = changed[0], held.get(changed[0])
            raise Misuse(f"DST was begun with {name} {before}, and this is {terms[name]}: choose another DST")
        return held["units"]
    units, batch = 0, []
    for item in _once(items):
        batch.append(item)
        if len(batch) == size:
            _write_unit(store, units, batch)
            units, batch = units + 1, []
    if batch:
        _write_unit(store, units, batch)
        units += 1
    store.write("_plan/complete.json", json.dumps({**terms, "units": units}).encode())
    return units


def _once(items: Iterable[Item]) -> Iterator[Item]:
    """Return the items without those whose id has come before."""
    seen = IdSet()
    return (item for item in items if seen.add(item.id))


def _write_unit(store: Store, unit: int, items: list[Item]) -> None:
    store.write(f"_plan/{unit:06}.json", json.dumps([asdict(item) for item in items]).encode())


def unit_items(store: Store, unit: int) -> list[Item]:
    """Return the images of one unit."""
    entries = json.loads(store.read(f"_plan/{unit:06}.json"))
    return [Item(**{k: v for k, v in entry.items() if k != "remote"}) for entry in entries]  # of an earlier version
