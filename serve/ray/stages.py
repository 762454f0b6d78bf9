"""The stages of serve.ray_batch, as Ray Data's actors run them: each takes a unit's batch of columns and gives one.

    {unit} --Decode--> {index, crop, kind, error} --Encode--> {embeds instead of crop} --Write--> captions, in a part

A unit stays one block from its plan to its part, and Write refuses what is less. What fails with an image travels on
as its kind and error.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from typing import Any

import numpy as np

from serve.command import Model
from serve.outputs.webdataset import END, sample
from serve.ray.store import Store, part, unit_items
from vlv.data.image import ImageError

Batch = dict[str, Any]


class Decode:
    """Plans to crops, in processes of the actor's own: a file that kills its decoder costs that image."""

    def __init__(self, args: argparse.Namespace):
        from serve.core.decode import DecodePool

        self._store = Store(args.output)
        self._loop, workers = asyncio.new_event_loop(), args.workers or 1
        self._pool = DecodePool(Model.of(args).checkpoint.config.image_size, workers, 4 * workers)
        self._loop.run_until_complete(self._pool.__aenter__())

    def __call__(self, batch: Batch) -> Batch:
        unit = int(batch["unit"][0])
        items = unit_items(self._store, unit)
        size = self._pool.crops.shape[-1]
        crops = np.zeros((len(items), 3, size, size), np.uint8)
        problems = [("", "")] * len(items)

        async def one(index: int) -> None:
            slot = await self._pool.slot()
            try:
                await self._pool.decode(items[index], slot)
                crops[index] = self._pool.crops[slot]
            except ImageError as error:
                problems[index] = (error.kind, str(error))
            finally:
                self._pool.release(slot)

        async def all_of_them() -> None:
            await asyncio.gather(*(one(index) for index in range(len(items))))

        self._loop.run_until_complete(all_of_them())
        kinds, errors = (np.array(column, dtype=object) for column in zip(*problems, strict=True))
        units = np.full(len(items), unit)
        return {"unit": units, "index": np.arange(len(items)), "crop": crops, "kind": kinds, "error": errors}


class Encode:
    """Crops to embeddings."""

    def __init__(self, args: argparse.Namespace):
        from serve.core.pipeline import open_encoder

        self._most = args.prompt_batch
        self._encoder = open_encoder(Model.of(args).checkpoint, args.encoder, args.artifacts)

    def __call__(self, batch: Batch) -> Batch:
        crops = np.array(batch.pop("crop"))  # a copy: Ray's are read-only
        parts = [self._encoder(crops[i : i + self._most]).float().numpy() for i in range(0, len(crops), self._most)]
        return {**batch, "embeds": np.concatenate(parts)}


class Write:
    """Embeddings to captions, by an engine of the actor's own, and to the unit's part in the store."""

    def __init__(self, args: argparse.Namespace):
        model = Model.of(args)
        self._store, self._raw, self._format = Store(args.output), args.raw, args.format
        self._engine = model.engine()
        self._mark = self._engine.options.mark(model.checkpoint.hash)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())

    def __call__(self, batch: Batch) -> Batch:
        unit = int(batch["unit"][0])
        items = unit_items(self._store, unit)
        if not np.array_equal(batch["index"], np.arange(len(items))):  # a part of it would pass for the whole
            came = f"{len(batch['index'])} of {len(items)} rows came together"
            raise RuntimeError(f"Ray has split unit {unit}, {came}: choose another DST and a smaller --unit")
        outcomes = self._loop.run_until_complete(self._captions(batch))
        records, samples, errors = [], [], []
        for item, outcome in zip(items, outcomes, strict=True):
            place = {"id": item.id, "path": item.path}
            try:
                if isinstance(outcome, ImageError):
                    raise outcome
                record = {**place, **outcome, "model": self._mark}
                if self._format == "webdataset":
                    samples.append(sample(f"{len(records):06}", item.read(), record))
                records.append(record)
            except ImageError as error:  # also of an image that is gone since it was decoded
                errors.append({**place, "kind": error.kind, "error": str(error)})
        failed = f"errors/{part(unit, '.parquet')}"
        if errors:
            self._store.write(failed, parquet(errors))
        else:  # those of an earlier try
            self._store.remove(failed)
        content = b"".join([*samples, END]) if self._format == "webdataset" else parquet(records)
        self._store.write(part(unit, ENDINGS[self._format]), content)
        return {"captions": np.array([len(records)]), "errors": np.array([len(errors)])}

    async def _captions(self, batch: Batch) -> list[dict | ImageError]:
        return await asyncio.gather(*(self._caption(batch, row) for row in range(len(batch["index"]))))

    async def _caption(self, batch: Batch, row: int) -> dict | ImageError:
        import torch

        from serve.engines.base import EmbedsError, Sampling
        from vlv.model.captioner import clean_caption

        if batch["kind"][row]:
            return ImageError(str(batch["kind"][row]), str(batch["error"][row]))
        embeds = torch.from_numpy(np.array(batch["embeds"][row], dtype=np.float32))
        try:
            completion = await self._engine.generate(embeds, Sampling(self._engine.max_tokens))
        except EmbedsError as error:
            return ImageError("encoder", str(error))
        text = completion.text if self._raw else clean_caption(completion.text)
        return {"caption": text, "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}


ENDINGS = {"parquet": ".parquet", "webdataset": ".tar"}
TEXTS = ("id", "path", "caption", "finish_reason", "model")


def parquet(rows: list[dict]) -> bytes:
    """Rows as a Parquet file; captions have their columns even where a unit has none."""
    import pyarrow as pa
    from pyarrow import parquet

    errors = bool(rows) and "error" in rows[0]
    fields = {name: pa.string() for name in (("id", "path", "kind", "error") if errors else TEXTS)}
    fields |= {} if errors else {"tokens": pa.int32()}
    whole = [{k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in r.items()} for r in rows]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(whole, pa.schema(fields.items())), file, compression="zstd")
    return file.getvalue()
