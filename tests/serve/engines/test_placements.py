"""Where the encoder runs beside vLLM: the captions are the same, from a real engine each."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from serve import PLACEMENTS
from serve.core.inputs import expand
from serve.core.run import CaptionRun, RunConfig
from serve.engines.base import EmbedsError, LLMSpec, OptionError, Options, Sampling
from serve.engines.transformers import TransformersEngine
from serve.engines.vllm import VLLMEngine
from serve.outputs.jsonl import FileSink
from serve.reports.progress import Progress
from tests.serve.engines.test_vllm import Shared
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import load_crop

TOKENS, SCENES = 48, 32


@pytest.fixture(scope="module")
def checkpoint(captioning_checkpoint) -> Checkpoint:
    return Checkpoint.open(captioning_checkpoint)


@pytest.fixture(scope="module")
def crops(checkpoint, scene_images) -> torch.Tensor:
    """uint8 [SCENES, 3, S, S]"""
    files = sorted(scene_images.glob("*.png"))[:SCENES]
    return torch.from_numpy(np.stack([load_crop(file, checkpoint.config.image_size) for file in files]))


@pytest.fixture(scope="module")
def embeds(checkpoint, crops) -> torch.Tensor:
    with torch.inference_mode():
        return checkpoint.load_encoder()(crops)


@pytest.fixture(scope="module")
def expected(checkpoint, embeds) -> list[list[int]]:
    """The tokens of transformers' generate."""

    async def generate():
        engine = TransformersEngine(LLMSpec.of(checkpoint), TOKENS, SCENES)
        await engine.start()
        try:
            return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds))
        finally:
            await engine.close()

    return [completion.token_ids for completion in asyncio.run(generate())]


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p != "process"])  # test_vllm.py is all about that
def test_captions_are_the_same(placement, checkpoint, scene_images, crops, embeds, expected, tmp_path, monkeypatch):
    """By requests of each kind, and through the whole pipeline from files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # where vLLM's processes find VLV's model
    engine = Shared(LLMSpec.of(checkpoint), TOKENS, 16, options=Options(placement=placement))
    inputs = crops if engine.takes_crops else embeds
    (tmp_path / "images").mkdir()
    for file in sorted(scene_images.glob("*.png"))[:SCENES]:
        (tmp_path / "images" / file.name).symlink_to(file)
    sink = FileSink(tmp_path / "c.jsonl", checkpoint.hash)

    async def caption():
        await VLLMEngine.start(engine)
        try:
            greedy = await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in inputs))
            pieces = [piece async for piece in engine.stream(inputs[3], Sampling(TOKENS))]
            tasks = [asyncio.create_task(engine.generate(row, Sampling(TOKENS))) for row in inputs]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            again = await engine.generate(inputs[5], Sampling(TOKENS))
            if not engine.takes_crops:
                with pytest.raises(EmbedsError):
                    await engine.generate(embeds[0] * float("nan"), Sampling(TOKENS))
            config = RunConfig(Sampling(TOKENS), prompt_batch=8, workers=1)
            await CaptionRun(checkpoint, engine, sink, config, Progress()).run(expand([str(tmp_path / "images")]))
            return greedy, pieces, again
        finally:
            await VLLMEngine.close(engine)

    greedy, pieces, again = asyncio.run(caption())
    sink.close()
    assert [completion.token_ids for completion in greedy] == expected
    assert [token for piece in pieces for token in piece.token_ids] == expected[3]
    assert len(pieces) > len(expected[3]) / 2
    assert again.token_ids == expected[5]
    records = sorted(map(json.loads, (tmp_path / "c.jsonl").read_text().splitlines()), key=lambda record: record["id"])
    assert [record["tokens"] for record in records] == [len(tokens) for tokens in expected]
    assert not [thread for thread in threading.enumerate() if thread.name == "vllm"]
    assert len({tuple(tokens) for tokens in expected}) > SCENES / 2  # the captions do depend on the images


def test_an_inline_engine_that_cannot_load_says_why_and_another_one_starts(checkpoint, embeds, expected, tmp_path):
    """In one process, as when a service starts its engine again."""
    from vllm import AsyncEngineArgs

    from serve.engines.vllm_inline import InlineEngine

    engine = VLLMEngine(LLMSpec.of(checkpoint), TOKENS, 4, options=Options(placement="inline"))
    engine._set_environment()
    arguments = {**engine._settings.arguments, **engine._prompt_arguments(), "kv_cache_memory_bytes": 1}
    with pytest.raises(ValueError, match="cache"):
        InlineEngine(AsyncEngineArgs(**arguments, skip_tokenizer_init=True).create_engine_config())

    async def generate():
        try:
            await engine.start()
            return await engine.generate(embeds[0], Sampling(TOKENS))
        finally:
            await engine.close()

    assert asyncio.run(generate()).token_ids == expected[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"placement": "engine", "lora": Path("x")}, "--lora does not go with --encoder-placement engine"),
        (
            {"placement": "inline", "tensor_parallel": 2},
            "--tensor-parallel does not go with --encoder-placement inline",
        ),
        ({"quantization": "fp8"}, "--llm-quantization fp8 needs a GPU"),
    ],
)
def test_what_does_not_go_together(checkpoint, options, words):
    with pytest.raises(OptionError, match=words):
        VLLMEngine(LLMSpec.of(checkpoint), TOKENS, 4, options=Options(**options))


def test_other_engines_take_none_of_it(checkpoint):
    for options, flag in (
        (Options(placement="inline"), "encoder-placement"),
        (Options(quantization="fp8"), "llm-quantization"),
        (Options(cache_dtype="fp8"), "kv-cache-dtype"),
    ):
        with pytest.raises(OptionError, match=f"--{flag} does not go with --engine transformers"):
            TransformersEngine(LLMSpec.of(checkpoint), TOKENS, 4, options=options)
