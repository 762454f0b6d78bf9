"""The first stage of serve.ray_batch. Its actors load no model's library: there may be many of them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from serve.core.decode import DecodePool
from serve.ray.store import Store, unit_items
from vlv.data.image import ImageError

Batch = dict[str, Any]


class Decode:
    """Decode a unit's images in processes of the actor's own: a file that kills its decoder costs that image."""

    def __init__(
        self,
        output: str,
        size: int,
        workers: int = 1,
        ignore_icc: bool = False,
        crop: str = "center",
        fast_jpeg: bool = False,
    ):
        """`output`: folder or URL of the parts; `size`: pixels of a crop's side; others as for `load_crops`."""
        self._store = Store(output)
        self._loop = asyncio.new_event_loop()
        self._crop = crop
        self._pool = DecodePool(size, workers, 4 * workers, ignore_icc=ignore_icc, fast_jpeg=fast_jpeg)
        self._loop.run_until_complete(self._pool.__aenter__())

    def __call__(self, batch: Batch) -> Batch:
        unit = int(batch["unit"][0])
        items = unit_items(self._store, unit)
        size = self._pool.crops.shape[-1]
        crops = np.zeros((len(items), 3, size, size), np.uint8)
        problems = [("", "")] * len(items)

        async def decode(index: int) -> None:
            slot = await self._pool.slot()
            try:
                await self._pool.decode(items[index], slot, self._crop)
                crops[index] = self._pool.crops[slot]
            except ImageError as error:
                problems[index] = (error.kind, str(error))
            finally:
                self._pool.release(slot)

        async def decode_all() -> None:
            await asyncio.gather(*(decode(index) for index in range(len(items))))

        self._loop.run_until_complete(decode_all())
        kinds, errors = (np.array(column, dtype=object) for column in zip(*problems, strict=True))
        units = np.full(len(items), unit)
        return {"unit": units, "index": np.arange(len(items)), "crop": crops, "kind": kinds, "error": errors}
