"""What the model sees is what the record says: the crop, and of tiles every square with its caption."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from serve.core.inputs import expand
from serve.core.record import joined
from serve.core.run import CaptionRun, RunConfig
from serve.engines.base import Completion, LLMEngine, LLMSpec, Sampling
from serve.outputs.formats import ParquetSink
from serve.outputs.jsonl import FileSink
from serve.reports import gallery
from serve.reports.progress import Progress
from vlv.checkpoints.folder import Checkpoint
from vlv.data.decoding.crop import PAD_COLOR
from vlv.data.scenes import HELD_OUT, render, sample

BILINEAR = Image.Resampling.BILINEAR


class Numbers(LLMEngine):
    """Writes the sum of the embeddings, which tells images apart, and a sentence that all captions share."""

    name = "numbers"
    tokens = None  # generate is all that a run asks for

    async def start(self) -> None:
        pass

    async def generate(self, embeds, sampling: Sampling) -> Completion:
        return Completion(f"A thing of {float(embeds.double().sum()):.2f} units. It is plain. Its", [1, 2], "length")

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint) -> Checkpoint:
    return Checkpoint.open(random_checkpoint)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two scenes of 64 pixels beside each other, and the folder of its file."""
    image = np.concatenate([render(sample(HELD_OUT + number)) for number in (1, 2)], axis=1)
    folder = tmp_path_factory.mktemp("wide")
    Image.fromarray(image).save(folder / "wide.png")
    return Image.fromarray(image), folder


def written(checkpoint, images) -> list[str]:
    """Return the cleaned texts that the engine must write of images of 64 x 64 pixels."""
    batch = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))
    with torch.inference_mode():
        embeds = checkpoint.load_encoder()(batch)
    return [f"A thing of {float(row.double().sum()):.2f} units. It is plain." for row in embeds]


def run(checkpoint, folder, output, sink_class=FileSink, **config) -> None:
    engine = Numbers(LLMSpec.of(checkpoint), max_tokens=20, in_flight=4)
    sink = sink_class(output, checkpoint.hash)
    try:
        settings = RunConfig(Sampling(20), workers=1, **config)
        asyncio.run(CaptionRun(checkpoint, engine, sink, settings, Progress()).run(expand([str(folder)])))
    finally:
        sink.close()


def caption(checkpoint, folder, output, **config) -> dict:
    run(checkpoint, folder, output, **config)
    (line,) = output.read_text().splitlines()
    return json.loads(line)


def test_one_square(checkpoint, wide, tmp_path):
    image, folder = wide
    seen = {
        "center": image.crop((32, 0, 96, 64)),
        "pad": ImageOps.pad(image, (64, 64), BILINEAR, PAD_COLOR),
        "squash": image.resize((64, 64), BILINEAR),
    }
    expected = dict(zip(seen, written(checkpoint, seen.values()), strict=True))
    assert len(set(expected.values())) == 3
    for crop, text in expected.items():
        record = caption(checkpoint, folder, tmp_path / f"{crop}.jsonl", crop=crop)
        assert same(record["caption"], text), crop
        assert record.get("crop") == (None if crop == "center" else crop) and "tiles" not in record


def same(text: str, expected: str) -> bool:
    """Return True if texts differ at most in the last digits of their numbers, which a batch's size changes."""
    number = re.compile(r"-?\d+\.\d+")
    pairs = zip(number.findall(text), number.findall(expected), strict=True)
    words = number.sub("", text) == number.sub("", expected)
    return words and all(abs(float(a) - float(b)) <= 0.05 for a, b in pairs)


def test_tiles_are_listed(checkpoint, wide, tmp_path):
    image, folder = wide
    places = [(0, 0, 64, 64), (32, 0, 96, 64), (64, 0, 128, 64)]
    texts = written(checkpoint, [image.crop(place) for place in places])
    record = caption(checkpoint, folder, tmp_path / "tiles.jsonl", crop="tiles")
    assert record["crop"] == "tiles" and [tuple(tile["box"]) for tile in record["tiles"]] == places
    assert all(same(tile["caption"], text) for tile, text in zip(record["tiles"], texts, strict=True))
    first, *others = texts
    together = " ".join([first, *(text.removesuffix(" It is plain.") for text in others)])
    assert same(record["caption"], together)  # a sentence of several squares stands once
    assert record["tokens"] == 6 and record["finish_reason"] == "length"
    page = tmp_path / "gallery.html"
    gallery.write(page, checkpoint, expand([str(folder)]), tmp_path / "tiles.jsonl")
    (entry,) = json.loads(re.search(r'id="records">(.*?)</script>', page.read_text()).group(1))
    assert entry["crop"] == "tiles" and entry["tiles"] == [tile["caption"] for tile in record["tiles"]]
    shown = Image.open(io.BytesIO(base64.b64decode(entry["image"].partition(",")[2])))  # a PNG: without loss
    squares = [np.asarray(image.crop(place)) for place in places]
    np.testing.assert_array_equal(np.asarray(shown), np.concatenate(squares, axis=1))


def test_several_captions_of_tiles(checkpoint, wide, tmp_path):
    record = caption(checkpoint, wide[1], tmp_path / "several.jsonl", crop="tiles", captions=2)
    assert [len(tile["captions"]) for tile in record["tiles"]] == [1, 1, 1]  # equal ones count once
    assert record["captions"] == [record["caption"]] and record["tokens"] == 12


def test_parquet_has_the_tiles(checkpoint, wide, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    run(checkpoint, wide[1], tmp_path / "parts", ParquetSink, crop="tiles")
    (row,) = parquet.read_table(tmp_path / "parts").to_pylist()
    assert row["crop"] == "tiles" and [tile["box"][0] for tile in row["tiles"]] == [0, 32, 64]


def test_texts_of_squares_without_a_period_stay():
    squares = [Completion(text, [1], "stop") for text in ("A cat. A", "", "a dog", "A cat.")]
    assert joined(squares, raw=False).text == "A cat. a dog. A cat."
    assert joined(squares, raw=True).text == "A cat. A  a dog A cat."
