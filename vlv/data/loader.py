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

from vlv.data.image import ImageError, load_crop
from vlv.data.remote import DataError
from vlv.data.samples import WINDOW, Sample, Source
from vlv.data.selection import Limits, Selection, row_name

REPLACEMENTS = 32  # rows tried in place of one that gives no image


class Order:
    """Position -> (shard, row). Every epoch has every row once: shards shuffled, and rows within a group of shards."""

    def __init__(self, rows: list[int], seed: int, group: int = WINDOW):
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

    def group_of(self, position: int) -> tuple[int, int]:
        """Return the first place in its epoch, and the number, of the rows shuffled together with a position's."""
        epoch, place = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        first, last = self._bounds(ends, int(np.searchsorted(ends, place, side="right")))
        start = int(ends[first - 1]) if first else 0
        return start, int(ends[last - 1]) - start

    def _bounds(self, ends: np.ndarray, shard: int) -> tuple[int, int]:
        """Return the first shard of the group that a shard belongs to, and the one behind its last."""
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
    """Position -> a crop, its caption and where it lies, of the rows of a selection.

    A row that gives no image is replaced by another, drawn at random, so that no other is trained more often than
    twice. Of several captions one is drawn for every epoch.
    """

    def __init__(
        self, source: Source, size: int, seed: int = 0, limits: Limits | None = None, selection: Selection | None = None
    ):
        self.source = source
        self.size = size
        self.seed = seed
        self.limits = limits or Limits()
        self.rows = selection.rows if selection else None
        counts = [len(rows) for rows in self.rows] if self.rows else source.rows
        self.order = Order(counts, seed, source.window)

    def place(self, position: int) -> tuple[int, int]:
        """Return shard and row of a position."""
        shard, number = self.order(position)
        return shard, int(self.rows[shard][number]) if self.rows else number

    def __getitem__(self, position: int) -> dict:
        (item,) = self.__getitems__([position])
        if "error" in item:
            raise DataError(item["error"])
        return item

    def __getitems__(self, positions: list[int]) -> list[dict]:
        """Return the items of a micro-batch, read together; or one item with the `error` that ends the run."""
        try:
            places = [self.place(position) for position in positions]
            samples = self.source.read_many(places, self.limits.captions)
            return [self._item(*of_row) for of_row in zip(positions, places, samples, strict=True)]
        except DataError as error:  # as a message: a worker's exception would come with its traceback
            return [{"error": str(error)}]

    def _item(self, position: int, place: tuple[int, int], sample: Sample | Exception) -> dict:
        skipped: list[tuple[str, str]] = []
        for attempt in range(REPLACEMENTS + 1):
            if attempt:
                place = self._other(position, attempt)
                (sample,) = self.source.read_many([place], self.limits.captions)
            try:
                if isinstance(sample, Exception):
                    raise sample
                if problem := self.limits.problem(sample):
                    raise ValueError(problem)
                pixels = load_crop(sample.image, self.size)
            except (ImageError, OSError, ValueError) as error:
                id = sample.id if isinstance(sample, Sample) else row_name(self.source, place)
                skipped.append((id, str(error)))
                continue
            caption = sample.caption
            if sample.captions:
                caption = sample.captions[np.random.default_rng([self.seed, position]).integers(len(sample.captions))]
            return {
                "pixels": pixels, "caption": caption, "place": place, "id": sample.id, "replaced": attempt > 0,
                "skipped": skipped,
            }  # fmt: skip
        id, reason = skipped[-1]
        raise DataError(f"{len(skipped)} rows drawn at random give no training image; the last, {id}: {reason}")

    def _other(self, position: int, attempt: int) -> tuple[int, int]:
        """Return a row drawn in place of a position's: at first among those that are read at that time."""
        draw = np.random.default_rng([self.seed, position, attempt])
        first, count = self.order.group_of(position) if attempt < 8 else (0, self.order.total)
        epoch = position // self.order.total * self.order.total
        return self.place(epoch + first + int(draw.integers(count)))


class MicroBatches(Sampler):
    """The positions of one process's forward passes, from a step's first image on, up to `end` or for ever."""

    def __init__(self, position: int, size: int, rank: int, processes: int, end: int | None = None):
        self.position = position
        self.size = size
        self.rank = rank
        self.processes = processes
        self.end = end

    def __iter__(self) -> Iterator[range]:
        start = self.position + self.rank * self.size
        while self.end is None or start < self.end:
            yield range(start, start + self.size)
            start += self.size * self.processes


def collate(samples: list[dict]) -> dict:
    """Stack: pixels uint8 [B, 3, S, S]; the rest become lists. An item with an `error` stays alone."""
    if failed := [sample for sample in samples if "error" in sample]:
        return failed[0]
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
    end: int | None = None,
) -> Iterator[dict]:
    """Yield one process's micro-batches from `position` on, up to `end` or for ever.

    A micro-batch has pixels uint8 [B, 3, S, S], and lists of captions, places and ids, and its `position`.

    Raises DataError where the data cannot be read any more.
    """
    positions = MicroBatches(position, micro_batch, rank, processes, end)
    options = {"multiprocessing_context": "forkserver", "prefetch_factor": 4} if workers else {}
    pinned = torch.device(device).type == "cuda"
    loader = DataLoader(
        data, batch_sampler=positions, collate_fn=collate, num_workers=workers, pin_memory=pinned, **options
    )
    stream = iter(loader)
    for place in positions:
        try:
            batch = next(stream)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise DataError(f"a process that reads images died ({reason}): fewer --workers need less memory") from error
        if "error" in batch:
            raise DataError(batch["error"])
        batch["pixels"] = batch["pixels"].to(device, non_blocking=True)
        yield batch | {"position": place.start}
