"""Test the sampling of the engines that draw here: what is asked for reaches the language model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from serve.engines.base import Completion, LLMEngine, LLMSpec, Sampling
from serve.engines.factory import engine_class
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import INSTALL
from vlv.data.image import load_crop

COUNT, TOKENS = 6, 40
DRAWN = Sampling(TOKENS, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def checkpoint(captioning_checkpoint) -> Checkpoint:
    return Checkpoint.open(captioning_checkpoint)


@pytest.fixture(scope="module")
def embeds(checkpoint, scene_images) -> Tensor:
    """Prompt embeddings [COUNT, queries, width]."""
    crops = np.stack([load_crop(scene_images / f"{i:02}.png", checkpoint.config.image_size) for i in range(COUNT)])
    with torch.inference_mode():
        return checkpoint.load_encoder()(torch.from_numpy(crops))


class Running:
    """An engine that runs; call it with a sampling: completions of every image."""

    def __init__(self, engine: LLMEngine, run: Callable, embeds: Tensor):
        """`run`: complete a coroutine on the engine's event loop; `embeds` [images, queries, width]."""
        self.engine, self.run, self.embeds = engine, run, embeds

    def __call__(self, sampling: Sampling) -> list[Completion]:
        async def all_of():
            return await asyncio.gather(*(self.engine.generate(row, sampling) for row in self.embeds))

        return self.run(all_of())

    def stream(self, sampling: Sampling) -> list[Completion]:
        """Return the pieces of the first image's completion."""

        async def streamed():
            return [piece async for piece in self.engine.stream(self.embeds[0], sampling)]

        return self.run(streamed())


@pytest.fixture(scope="module", params=["transformers", "llamacpp"])  # test_vllm.py runs these tests with its engine
def generate(request, checkpoint, embeds):
    if request.param == "llamacpp":
        pytest.importorskip("xllamacpp", reason=INSTALL["xllamacpp"])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    engine = engine_class(request.param)(LLMSpec.of(checkpoint), TOKENS, 8)

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(300)

    run(engine.start())
    yield Running(engine, run, embeds)
    run(engine.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def greedy(generate) -> list[list[int]]:
    return [completion.token_ids for completion in generate(Sampling(TOKENS))]


def test_sampling_that_leaves_one_token_is_greedy(generate, greedy):
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert [c.token_ids for c in generate(replace(DRAWN, **fields))] == greedy, fields
    drawn = [c.token_ids for c in generate(replace(DRAWN, temperature=2.0))]
    assert drawn != greedy  # so the three above are no accident


def test_lengths(generate, greedy):
    ended = [i for i, ids in enumerate(greedy) if len(ids) < TOKENS]
    assert ended, "no caption here ends by itself"
    for completion in generate(Sampling(TOKENS, ignore_eos=True)):
        assert len(completion.token_ids) == TOKENS and completion.finish_reason == "length"
    at_least = min(TOKENS, max(len(greedy[i]) for i in ended) + 2)
    for completion in generate(Sampling(TOKENS, min_tokens=at_least)):
        assert len(completion.token_ids) >= at_least
    ids = [i for piece in generate.stream(Sampling(TOKENS, ignore_eos=True)) for i in piece.token_ids]
    assert len(ids) == TOKENS


def test_log_probabilities_are_the_models(generate, greedy, checkpoint):
    """Against one forward pass of transformers over prompt and caption."""
    if not generate.engine.has_logprobs:
        assert all(completion.logprobs is None for completion in generate(Sampling(TOKENS)))
        return
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(checkpoint.llm, dtype=torch.float32).eval()
    for completion, row in zip(generate(Sampling(TOKENS, logprobs=2)), generate.embeds, strict=True):
        ids = torch.tensor(completion.token_ids)
        with torch.inference_mode():
            prompt = torch.cat([row, llm.get_input_embeddings()(ids)])[None]
            expected = llm(inputs_embeds=prompt).logits[0, len(row) - 1 : -1].log_softmax(-1)
        assert len(completion.logprobs) == len(ids)
        for step, token, values in zip(completion.logprobs, ids.tolist(), expected, strict=True):
            assert token in step and len(step) == 2
            for other, logprob in step.items():
                assert logprob == pytest.approx(float(values[other]), abs=1e-3)
    pieces = generate.stream(Sampling(TOKENS, logprobs=2))
    steps = [step for piece in pieces for step in piece.logprobs or []]
    assert [max(step, key=step.get) for step in steps] == greedy[0]
