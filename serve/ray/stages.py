"""The stages of serve.ray_batch that run models, as actors of Ray Data: each takes a unit's columns and returns some.

    {unit} --Decode--> {index, crop, kind, error} --Encode--> {embeds instead of crop} --Write--> captions, in a part

They are adapters over the parts of the captioning service: its encoder batches, its engines and its records; the decode
pool is that of serve/ray/decode.py. A unit stays one block from its plan to its part, and Write refuses an incomplete
one. An image that fails travels on as its kind and error.
"""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from serve.core.batcher import Encoder
from serve.core.inputs import Item
from serve.core.model import Model, ModelOptions
from serve.core.record import caption_record, crop_fields, error_record
from serve.engines.base import EmbedsError, Sampling
from serve.outputs.webdataset import END, sample
from serve.ray.store import Store, part, unit_items
from vlv.data.image import ImageError

Batch = dict[str, Any]
ENDINGS = {"parquet": ".parquet", "webdataset": ".tar"}
TEXT_COLUMNS = ("id", "path", "caption", "finish_reason", "model", "flags")
ERROR_COLUMNS = ("id", "path", "kind", "error")


@dataclass(frozen=True)
class StageOptions:
    """What every stage has to know."""

    model: ModelOptions
    output: str  # folder or URL of the parts
    format: str = "parquet"  # one of ENDINGS
    raw: bool = False  # captions as the model wrote them, without the clean-up
    flags: str = ""  # for the records: what changes captions beside the model


class Encode:
    """Encode a unit's crops."""

    def __init__(self, options: StageOptions):
        model = options.model
        self._encoder = Encoder(
            Model.of(model).checkpoint,
            model.encoder,
            model.artifacts,
            model.prompt_batch,
            precision=model.precision,
            cuda_graphs=model.cuda_graphs,
        )

    def __call__(self, batch: Batch) -> Batch:
        crops = np.array(batch.pop("crop"))  # a copy: Ray's are read-only
        return {**batch, "embeds": self._encoder(crops).numpy()}


class Write:
    """Caption a unit's embeddings with an engine of the actor's own, and write the unit's part to the store."""

    def __init__(self, options: StageOptions):
        model = Model.of(options.model)
        self._options = options
        self._store = Store(options.output)
        self._engine = model.engine()
        self._model_id = self._engine.options.model_id(model.checkpoint.hash)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())

    def __call__(self, batch: Batch) -> Batch:
        unit = int(batch["unit"][0])
        items = unit_items(self._store, unit)
        if not np.array_equal(batch["index"], np.arange(len(items))):  # an incomplete part would pass for the unit
            came = f"{len(batch['index'])} of {len(items)} rows came together"
            raise RuntimeError(f"Ray has split unit {unit}, {came}: choose another DST and a smaller --unit")
        outcomes = self._loop.run_until_complete(self._captions(items, batch))
        records, samples, errors = [], [], []
        for item, record in zip(items, outcomes, strict=True):
            try:
                if "error" not in record and self._options.format == "webdataset":
                    samples.append(sample(f"{len(records):06}", item.read(), record))
            except ImageError as error:  # the image has disappeared since it was decoded
                record = error_record(item, error.kind, str(error))
            (errors if "error" in record else records).append(record)
        failed = f"errors/{part(unit, '.parquet')}"
        if errors:
            self._store.write(failed, parquet_file(errors, ERROR_COLUMNS))
        else:  # those of an earlier try
            self._store.remove(failed)
        if self._options.format == "webdataset":
            content = b"".join([*samples, END])
        else:
            content = parquet_file(records, TEXT_COLUMNS, ("tokens",))
        self._store.write(part(unit, ENDINGS[self._options.format]), content)
        return {"captions": np.array([len(records)]), "errors": np.array([len(errors)])}

    async def _captions(self, items: list[Item], batch: Batch) -> list[dict]:
        return await asyncio.gather(*(self._caption(item, batch, row) for row, item in enumerate(items)))

    async def _caption(self, item: Item, batch: Batch, row: int) -> dict:
        """Return the record of one image, with its caption or its error."""
        if batch["kind"][row]:
            return error_record(item, str(batch["kind"][row]), str(batch["error"][row]))
        embeds = torch.from_numpy(np.array(batch["embeds"][row], dtype=np.float32))
        try:
            completion = await self._engine.generate(embeds, Sampling(self._engine.max_tokens))
        except EmbedsError as error:
            return error_record(item, "encoder", str(error))
        crop = crop_fields(self._options.model.crop, [], [], self._options.raw)
        return caption_record(item, [completion], self._options.raw, self._model_id, self._options.flags, crop=crop)


def parquet_file(rows: list[dict], texts: tuple[str, ...], numbers: tuple[str, ...] = ()) -> bytes:
    """Return rows as the content of a Parquet file, which has its columns even without a row."""
    fields = [(name, pa.string()) for name in texts] + [(name, pa.int32()) for name in numbers]
    rows = [{k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in r.items()} for r in rows]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), file, compression="zstd")
    return file.getvalue()
