"""The pipeline with a language model of the test's making: bounds, bad images, resuming, failures."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve.core.inputs import expand
from serve.core.run import CaptionRun, RunConfig
from serve.engines.base import Completion, EmbedsError, EngineError, LLMEngine, LLMSpec, Sampling, load_tokenizer
from serve.outputs.formats import SidecarSink
from serve.outputs.jsonl import FileSink
from serve.reports.progress import Progress
from serve.reports.timeline import Timeline
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.data.image import load_crops


class Fake(LLMEngine):
    """Says how long the embeddings are; remembers how many requests were open at a time."""

    name = "fake"
    tokens = None  # generate is all that the pipeline asks for
    open = most = 0
    started = closed = False

    async def start(self) -> None:
        await asyncio.sleep(0.2)
        self.started = True

    async def generate(self, embeds, sampling: Sampling) -> Completion:
        assert self.started
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.005)
        self.open -= 1
        self.spec.check(embeds)
        return Completion(f"Seed {sampling.seed}. Again. Again. And", list(range(7)), "stop")

    async def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint) -> Checkpoint:
    return Checkpoint.open(random_checkpoint)


def caption(
    checkpoint, paths, output, engine=None, sink_class=FileSink, **config
) -> tuple[Progress, list[dict], list[dict]]:
    engine = engine or Fake(LLMSpec.of(checkpoint), max_tokens=20, in_flight=4)
    progress, sink = Progress(), sink_class(output, checkpoint.hash)
    settings = RunConfig(**{"sampling": Sampling(20), "prompt_batch": 4, "workers": 1, **config})
    try:
        asyncio.run(CaptionRun(checkpoint, engine, sink, settings, progress).run(expand([str(p) for p in paths])))
    finally:
        sink.close()
        assert engine.closed or not engine.started
    files = (output, sink.errors_path)
    return progress, *([json.loads(line) for line in f.read_text().splitlines()] if f.exists() else [] for f in files)


def test_captions_every_image_within_its_bounds(checkpoint, scene_images, tmp_path):
    engine = Fake(LLMSpec.of(checkpoint), max_tokens=20, in_flight=4)
    progress, records, errors = caption(checkpoint, [scene_images], tmp_path / "c.jsonl", engine)
    assert sorted(r["id"] for r in records) == [i.id for i in expand([str(scene_images)])] and not errors
    assert progress.captioned == 64 and progress.first is not None
    assert 4 <= engine.most <= 8  # in flight, and one batch that waits
    record = records[0]
    assert record["caption"].startswith("Seed ") and record["caption"].endswith(". Again.")  # cleaned
    assert (record["tokens"], record["finish_reason"], record["model"]) == (7, "stop", checkpoint.hash)
    assert record["path"] == record["id"] and record["timings"]["llm"] > 0 and record["timings"]["encode"] > 0


def test_large_jpeg_files_are_decoded_at_a_part_of_their_size(checkpoint, tmp_path, monkeypatch):
    seen, size, spec = [], checkpoint.config.image_size, LLMSpec.of(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (12 * size, 12 * size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg")

    class Zeros:
        batch = 4

        def __init__(self, *given):
            pass

        def __call__(self, crops):
            seen.append(crops[0].copy())
            return torch.zeros(len(crops), spec.queries, spec.width)

    monkeypatch.setattr("serve.core.service.Encoder", Zeros)
    for fast in (False, True):
        caption(checkpoint, [tmp_path / "large.jpg"], tmp_path / f"{fast}.jsonl", fast_jpeg=fast)
        assert np.array_equal(seen[-1], load_crops(tmp_path / "large.jpg", size, fast_jpeg=fast).pixels[0])
    assert not np.array_equal(*seen)


def test_the_timeline_names_the_slowest_stage(checkpoint, scene_images, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.reports.timeline.MIN_SECONDS", 0.5)

    class Slow(Fake):
        async def generate(self, embeds, sampling):
            await asyncio.sleep(0.25)
            return await super().generate(embeds, sampling)

    engine, timeline = Slow(LLMSpec.of(checkpoint), 20, in_flight=4), Timeline(tmp_path / "trace.json")
    sink, settings = FileSink(tmp_path / "c.jsonl", checkpoint.hash), RunConfig(Sampling(20), 4, 1, limit=24)
    run = CaptionRun(checkpoint, engine, sink, settings, Progress(), timeline)
    asyncio.run(run.run(expand([str(scene_images)])))
    used = timeline.utilisation()
    timeline.close()
    sink.close()
    assert max(used, key=used.get) == "the language model" and used["the language model"] > 0.5
    assert "the pace was set by the language model" in timeline.summary()
    events = json.loads((tmp_path / "trace.json").read_text())
    spans = [e for e in events if e["ph"] == "X"]
    counts = Counter(e["cat"] for e in spans)
    assert counts["decoding"] == counts["the language model"] == 24 and counts["loading"] == 1
    assert sum(e["args"]["images"] for e in spans if e["cat"] == "the encoder") == 24
    rows = {e["tid"] for e in events if e.get("name") == "thread_name"}
    assert {e["tid"] for e in spans} == rows
    for row in rows:  # no two spans of a row overlap
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == row)
        assert all(end <= start + 2 for (_, end), (start, _) in itertools.pairwise(times))


def test_resumes_and_limits(checkpoint, scene_images, tmp_path):
    output = tmp_path / "c.jsonl"
    progress, records, _ = caption(checkpoint, [scene_images], output, limit=5, raw=True)
    assert progress.captioned == 5 and records[0]["caption"].endswith(" Again. Again. And")
    progress, records, _ = caption(checkpoint, [scene_images], output, limit=5)
    assert (progress.captioned, progress.skipped, len(records)) == (0, 5, 5)
    progress, records, _ = caption(checkpoint, [scene_images, f"{scene_images}/*.png"], output, limit=70)
    assert (progress.captioned, progress.skipped, progress.repeated) == (59, 5, 6)
    assert "5 done before, 6 named twice" in progress.summary()
    assert len({r["id"] for r in records}) == len(records) == 64
    seeds = {r["id"]: r["caption"].split(".")[0] for r in records}
    assert len(set(seeds.values())) == 64  # each image draws from a seed of its own


def test_several_captions_an_image(checkpoint, scene_images, tmp_path):
    class Twins(Fake):
        async def generate(self, embeds, sampling):
            return Completion(f"Even {sampling.seed % 2}.", [1, 2], "stop")

    engine = Twins(LLMSpec.of(checkpoint), 20, 4)
    _, records, _ = caption(checkpoint, [scene_images], tmp_path / "c.jsonl", engine, captions=3)
    kinds = {tuple(r["captions"]) for r in records}
    assert kinds == {("Even 0.",), ("Even 1.",), ("Even 0.", "Even 1."), ("Even 1.", "Even 0.")}
    assert all(r["caption"] == r["captions"][0] and r["tokens"] == 6 for r in records) and len(records) == 64


def test_runs_of_consecutive_seeds_share_no_draw(checkpoint, scene_images, tmp_path):
    seeds = []
    for seed in (0, 1, 2):

        class Seeds(Fake):
            async def generate(self, embeds, sampling):
                seeds.append(sampling.seed)
                return Completion("A circle.", [1, 2], "stop")

        engine, sampling = Seeds(LLMSpec.of(checkpoint), 20, 4), Sampling(20, 1.0, seed)
        caption(checkpoint, [scene_images], tmp_path / f"{seed}.jsonl", engine, captions=3, limit=4, sampling=sampling)
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 4


def test_bad_images_are_records_of_their_own(checkpoint, scene_images, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").symlink_to(scene_images / f"{i:02}.png")
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    progress, _, errors = caption(checkpoint, [folder], tmp_path / "c.jsonl")
    assert (progress.captioned, progress.failed) == (5, 2)
    assert {e["id"].rsplit("/")[-1]: e["kind"] for e in errors} == {"empty.jpg": "empty", "text.jpg": "format"}
    assert all(e["error"] and e["path"] == e["id"] for e in errors)
    progress, *_ = caption(checkpoint, [folder], tmp_path / "c.jsonl")
    assert progress.skipped == 7 and progress.finished == 0


def test_what_the_output_cannot_hold_has_failed(checkpoint, scene_images, tmp_path):
    (tmp_path / "a.png").symlink_to(scene_images / "00.png")
    (tmp_path / "a.txt").write_text("mine")
    progress, _, errors = caption(checkpoint, [tmp_path], tmp_path / "c.jsonl", sink_class=SidecarSink)
    assert (progress.captioned, progress.failed) == (0, 1) and errors[0]["kind"] == "exists"


def test_embeddings_that_overflow_cost_one_image(checkpoint, scene_images, tmp_path):
    class Overflowing(Fake):
        async def generate(self, embeds, sampling):
            self.count = getattr(self, "count", 0) + 1
            return await super().generate(embeds * float("nan") if self.count == 3 else embeds, sampling)

    engine = Overflowing(LLMSpec.of(checkpoint), 20, 4)
    progress, _, errors = caption(checkpoint, [scene_images], tmp_path / "c.jsonl", engine, limit=9)
    assert (progress.captioned, progress.failed) == (8, 1)
    assert errors[0]["kind"] == "encoder" and "not finite" in errors[0]["error"]


@pytest.mark.parametrize("method", ["start", "generate"])
def test_an_engine_that_dies_ends_the_run_in_one_error(checkpoint, scene_images, tmp_path, method):
    async def die(*_):
        raise EngineError("it died")

    engine = Fake(LLMSpec.of(checkpoint), 20, 4)
    setattr(engine, method, die)
    with pytest.raises(EngineError, match="it died"):
        caption(checkpoint, [scene_images], tmp_path / "c.jsonl", engine)


def test_nothing_is_loaded_when_nothing_is_to_do(checkpoint, tmp_path, scene_images):
    caption(checkpoint, [scene_images / "00.png"], tmp_path / "c.jsonl")
    engine = Fake(LLMSpec.of(checkpoint), 20, 4)
    caption(checkpoint, [scene_images / "00.png"], tmp_path / "c.jsonl", engine)
    assert not engine.started


def test_only_bad_images_do_not_wait_for_the_engine(checkpoint, tmp_path):
    class Slow(Fake):
        async def start(self):
            await asyncio.sleep(3600)

    (tmp_path / "empty.jpg").touch()
    engine = Slow(LLMSpec.of(checkpoint), 20, 4)
    progress, *_ = caption(checkpoint, [tmp_path / "empty.jpg"], tmp_path / "c.jsonl", engine)
    assert progress.failed == 1


@pytest.mark.parametrize("content", ["[1]", "5", "{}", '{"hidden_size": 128, "num_attention_heads": 0}', "[" * 100_000])
def test_configurations_that_describe_no_language_model(captioning_checkpoint, tmp_path, content):
    folder = Path(shutil.copytree(captioning_checkpoint, tmp_path / "c", ignore=shutil.ignore_patterns("t2i")))
    (folder / "llm" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"llm/config\.json does not describe a causal language model"):
        LLMSpec.of(Checkpoint.open(folder))
    (folder / "llm" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="llm holds no tokenizer"):
        load_tokenizer(folder / "llm")


def test_what_the_language_model_takes(checkpoint):
    import torch

    spec = LLMSpec.of(checkpoint)
    spec.check(torch.zeros(spec.queries, spec.width))
    for wrong in (
        torch.zeros(spec.queries, spec.width + 1), torch.zeros(1, spec.queries, spec.width),
        torch.zeros(spec.queries, spec.width, dtype=torch.int64), torch.full((spec.queries, spec.width), torch.inf),
        torch.zeros(spec.queries, spec.width, dtype=torch.float8_e4m3fn),
    ):  # fmt: skip
        with pytest.raises(EmbedsError):
            spec.check(wrong)
    assert spec.max_tokens(None) == 300 and spec.max_tokens(17) == 17
    with pytest.raises(ValueError, match="1 to 992 "):
        spec.max_tokens(993)
