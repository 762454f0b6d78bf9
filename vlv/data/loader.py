"""The endless, deterministic stream of training batches, which any position resumes.

A position is a number of images. What lies there follows from the seed and the position alone, whatever the number of
processes and workers: so a run resumes in mid-epoch exactly, and by more or fewer GPUs sees the same data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlv.data.image import ImageError, image_size, load_crop
from vlv.data.remote import DataError
from vlv.data.samples import Source

GROUP = 65_536  # rows shuffled together: those of few shards, so that object stores are read in long stretches
NEIGHBOURS = 32  # rows tried in place of one that gives no picture


class Order:
    """Position -> (shard, row). Every epoch has every row once: shards shuffled, and rows within a group of shards."""

    def __init__(self, rows: list[int], seed: int, group: int = GROUP):
        self.rows, self.seed, self.group, self.total = np.asarray(rows), seed, group, int(sum(rows))
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle_shards)
        self._within = functools.lru_cache(maxsize=4)(self._shuffle_rows)

    def __reduce__(self):  # a worker makes its own shuffles
        return Order, (self.rows.tolist(), self.seed, self.group)

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.total)
        shards, ends = self._epoch(epoch)
        # groups are runs of shards that begin at every multiple of `group` rows
        shard = int(np.searchsorted(ends, place, side="right"))
        first, last = self._bounds(ends, shard)
        start = int(ends[first - 1]) if first else 0
        place = start + int(self._within(epoch, first, last)[place - start])
        shard = int(np.searchsorted(ends, place, side="right"))
        return int(shards[shard]), place - (int(ends[shard - 1]) if shard else 0)

    def _bounds(self, ends: np.ndarray, shard: int) -> tuple[int, int]:
        """The first shard of the group that a shard belongs to, and the one behind its last."""
        number = (int(ends[shard]) - 1) // self.group
        low, high = np.searchsorted(ends, [number * self.group, (number + 1) * self.group], side="right")
        return int(low), int(high)

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = np.random.default_rng([self.seed, epoch]).permutation(np.flatnonzero(self.rows))
        return shards, np.cumsum(self.rows[shards])

    def _shuffle_rows(self, epoch: int, first: int, last: int) -> np.ndarray:
        _, ends = self._epoch(epoch)
        count = int(ends[last - 1]) - (int(ends[first - 1]) if first else 0)
        return np.random.default_rng([self.seed, epoch, first]).permutation(count)


class TrainingImages(Dataset):
    """Position -> a crop, its caption and where it lies; a row that gives none is replaced by the next of its shard."""

    def __init__(
        self,
        source: Source,
        size: int,
        seed: int = 0,
        captions: bool = False,
        min_side: int = 0,
        max_aspect: float = 0.0,
    ):
        self.source = source
        self.size = size
        self.captions = captions
        self.min_side = min_side
        self.max_aspect = max_aspect
        self.order = Order(source.rows, seed)

    def __getitem__(self, position: int) -> dict:
        shard, row = self.order(position)
        tried = min(NEIGHBOURS, self.source.rows[shard])
        problem = ""
        for offset in range(tried):
            place = (row + offset) % self.source.rows[shard]
            sample = None
            try:
                sample = self.source.read(shard, place)
                self._check(sample.image, sample.caption)
                pixels = load_crop(sample.image, self.size)
            except (ImageError, OSError, ValueError) as error:
                problem = f"{sample.id if sample else f'row {place} of shard {shard}'}: {error}"
                continue
            return {
                "pixels": pixels, "caption": sample.caption, "place": (shard, place), "id": sample.id,
                "replaced": offset > 0,
            }  # fmt: skip
        raise DataError(f"{tried} rows in a row give no training image; the last, {problem}")

    def _check(self, content: bytes, caption: str | None) -> None:
        """Raises ValueError for what the flags leave out."""
        if self.captions and not caption:
            raise ValueError("it has no caption")
        if self.captions and not isinstance(caption, str):
            raise ValueError(f"its caption is a {type(caption).__name__}, expected a text: give one caption a row")
        if self.min_side or self.max_aspect:
            try:
                short, long = sorted(image_size(content))
            except Exception as error:
                raise ValueError(f"no image ({error})") from error
            if short < self.min_side or (self.max_aspect and long > self.max_aspect * short):
                raise ValueError(f"{short} x {long} pixels is left out by --min-side or --max-aspect")


class MicroBatches(Sampler):
    """The positions of one process's forward passes, from a step's first image on, for ever."""

    def __init__(self, position: int, size: int, rank: int, processes: int):
        self.position, self.size, self.rank, self.processes = position, size, rank, processes

    def __iter__(self) -> Iterator[range]:
        start = self.position + self.rank * self.size
        while True:
            yield range(start, start + self.size)
            start += self.size * self.processes


def collate(samples: list[dict]) -> dict:
    """Stack: pixels uint8 [B, 3, S, S]; the rest become lists."""
    batch = {key: [s[key] for s in samples] for key in samples[0]}
    return batch | {"pixels": torch.from_numpy(np.stack(batch["pixels"]))}


def batches(
    data: TrainingImages,
    micro_batch: int,
    position: int = 0,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[dict]:
    """Yield one process's micro-batches from `position` on: pixels [B, 3, S, S], captions, places, `position`."""
    positions = MicroBatches(position, micro_batch, rank, processes)
    options = {"multiprocessing_context": "forkserver", "prefetch_factor": 4} if workers else {}
    pinned = torch.device(device).type == "cuda"
    loader = DataLoader(
        data, batch_sampler=positions, collate_fn=collate, num_workers=workers, pin_memory=pinned, **options
    )
    for place, batch in zip(positions, loader, strict=False):
        batch["pixels"] = batch["pixels"].to(device, non_blocking=True)
        yield batch | {"position": place.start}
