"""Keep the frozen autoencoder's latents on the disk, so that a second epoch of stage 1 does not compute them again.

The posterior's mean and deviation are kept in float16, so that every epoch still draws its own sample. One sparse
file a shard of the data, in a folder named after the autoencoder's weights; every row has a checksum, so a row half
written by a killed run counts as missing.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlv.common.files import atomic_write
from vlv.data import scene_batches
from vlv.data.samples import Source
from vlv.diffusion.t2i import T2I


class LatentCache:
    """Keeps rows of [2, c, s, s] float16, mean and deviation, by (shard, row) of a source."""

    def __init__(self, folder: str | Path, vae_folder: Path, source: Source, size: int):
        # the first row tells sources of equal shape apart; its image too, as many number their rows from 1
        first = source.read(next(shard for shard, rows in enumerate(source.rows) if rows), 0)
        digest = hashlib.sha256(f"{source.rows} {first.id} {size}".encode())
        digest.update(hashlib.sha256(first.image).digest())
        for file in sorted(vae_folder.iterdir()):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        self.folder = Path(folder) / digest.hexdigest()[:16]
        self._rows = source.rows
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shape: tuple[int, ...] = ()
        self._open = functools.lru_cache(maxsize=64)(self._open_shard)

    def moments(self, places: list[tuple[int, int]], encode) -> Tensor:
        """[B, 2, c, s, s] float32 of these rows; `encode()` gives them where one is missing, and they are kept.

        All come from `encode` then, as in a run without this cache up to there: batches, not rows, decide the last
        bits. They are rounded to float16 in either case, so a resumed run sees the same values.
        """
        if self._shape and (kept := self._read(places)) is not None:
            return kept
        fresh = encode().half()
        self._shape = tuple(fresh.shape[1:])
        if (kept := self._read(places)) is not None:
            return kept
        for (shard, row), value in zip(places, fresh.cpu().numpy(), strict=True):
            values, sums = self._open(shard)
            values[row] = value
            sums[row] = _checksum(value)
        return fresh.float()

    def _read(self, places: list[tuple[int, int]]) -> Tensor | None:
        found = []
        for shard, row in places:
            values, sums = self._open(shard)
            if not sums[row] or sums[row] != _checksum(values[row]):
                return None
            found.append(values[row])
        return torch.from_numpy(np.stack(found)).float()

    def _open_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(
            self._map(self.folder / f"{shard:06}.{kind}", dtype, (self._rows[shard], *shape))
            for kind, dtype, shape in (("f16", np.float16, self._shape), ("crc", np.uint32, ()))
        )

    @staticmethod
    def _map(file: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
        with file.open("ab") as stream:  # sparse: a row takes room when it is written
            stream.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(row)) or 1  # 0 means missing


def scene_latents(t2i: T2I, pool: int, run: Path) -> Tensor:
    """Return the scaled latents of the scenes 0..pool-1: [pool, c, s, s] float16, computed once, kept in `run`.

    They are kept by the pool and by what made them, so that another autoencoder in the same run gets its own.
    """
    digest = hashlib.sha256(f"{pool} {t2i.vae.config.scaling_factor}".encode())
    for weight in t2i.vae.state_dict().values():
        digest.update(weight.half().cpu().numpy().tobytes())  # as the folder holds it, which stage 1 loads
    path = run / f"latents-{digest.hexdigest()[:12]}.pt"
    if not path.exists():
        torch.manual_seed(0)
        with torch.inference_mode():
            parts = [
                t2i.encode_images(scene_batches.images(range(i, min(i + 256, pool))).to(t2i.vae.device)).half().cpu()
                for i in range(0, pool, 256)
            ]
        with atomic_write(path) as file:
            torch.save(torch.cat(parts), file)
    return torch.load(path, weights_only=True, mmap=True)
