"""llama.cpp itself against transformers' own generate; its sampling against transformers' probabilities."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from vlv.common.command import INSTALL

pytest.importorskip("xllamacpp", reason=INSTALL["xllamacpp"])
pytest.importorskip("gguf", reason=INSTALL["gguf"])

from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from export.builders.gguf import write_gguf
from serve.engines.base import EmbedsError, EngineError, LLMSpec, OptionError, Options, Sampling
from serve.engines.llamacpp import LlamaCppEngine, _Job, choose
from serve.vllm_caption import main
from vlv.checkpoints.folder import Checkpoint
from vlv.data import scene_batches, scenes
from vlv.model.captioner import Captioner

TOKENS, SCENES = 96, 64


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def checkpoint(captioning_checkpoint) -> Checkpoint:
    return Checkpoint.open(captioning_checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint) -> tuple[torch.Tensor, list[list[int]]]:
    """Prompt embeddings [SCENES, queries, width] of held-out scenes, and transformers' greedy tokens in float32."""
    images = scene_batches.images(range(scenes.HELD_OUT + 5000, scenes.HELD_OUT + 5000 + SCENES))
    captioner = Captioner.load(checkpoint)
    with torch.inference_mode():
        embeds = captioner.encoder(images)
    return embeds, captioner.generate(images, max_new_tokens=TOKENS)


def run(checkpoint, use, in_flight: int = SCENES, max_tokens: int = TOKENS, **options):
    """Return what the coroutine function `use` makes of a started engine, which is closed then."""

    async def whole():
        engine = LlamaCppEngine(LLMSpec.of(checkpoint), max_tokens, in_flight, options=Options(**options))
        try:
            await engine.start()
            return await asyncio.wait_for(use(engine), 120)
        finally:
            await engine.close()
            assert not engine.alive

    return asyncio.run(whole())


@pytest.mark.parametrize("in_flight", [1, 7, SCENES])
def test_float32_writes_transformers_tokens(in_flight, checkpoint, reference):
    """One caption at a time, in a few sequences, and with more requests than sequences."""
    embeds, expected = reference
    count = 12 if in_flight == 1 else SCENES

    async def use(engine):
        assert engine.sequences == min(in_flight, 8)  # of a small model
        return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds[:count]))

    completions = run(checkpoint, use, in_flight, gguf_type="f32")
    assert [c.token_ids for c in completions] == expected[:count]
    assert {c.finish_reason for c in completions} == {"stop"}


def test_float16_takes_embeddings_of_any_float_type(checkpoint, reference):
    embeds, expected = reference

    async def use(engine):
        rows = [*embeds.double()[:30], *embeds.bfloat16()[30:60].float(), embeds[60]]
        found = await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in rows))
        with pytest.raises(EmbedsError, match="not finite in float32"):
            await engine.generate(embeds[0].double() * 1e300, Sampling(TOKENS))
        return found

    found = [c.token_ids for c in run(checkpoint, use)]
    assert sum(a == b for a, b in zip(found[:30], expected[:30], strict=True)) >= 29 and found[60] == expected[60]


def test_streams_the_same_and_ends_at_stop_texts(checkpoint, reference):
    embeds, expected = reference

    async def use(engine):
        whole = await engine.generate(embeds[3], Sampling(TOKENS))
        parts = [piece async for piece in engine.stream(embeds[3], Sampling(TOKENS))]
        stop = whole.text[len(whole.text) // 2 :][:3]
        stopped = await engine.generate(embeds[3], Sampling(TOKENS, stop=(stop,)))
        again = await engine.generate(embeds[3], Sampling(TOKENS))
        return whole, parts, stop, stopped, again

    whole, parts, stop, stopped, again = run(checkpoint, use, 1, gguf_type="f32")
    assert "".join(p.text for p in parts) == whole.text and len(parts) > len(whole.token_ids) // 2
    assert [i for p in parts for i in p.token_ids] == whole.token_ids == expected[3]
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    assert again.token_ids == whole.token_ids  # the stopped request has left the only sequence


def test_unusable_embeddings_are_refused_and_harm_nobody(checkpoint, reference):
    embeds, expected = reference

    async def use(engine):
        wrong = [embeds[0, :, :-1], embeds[0, :-1], embeds[:1], embeds[0] * float("inf"), embeds[0].long()]
        requests = (engine.generate(row, Sampling(TOKENS)) for row in [*wrong, embeds[1]])
        return await asyncio.gather(*requests, return_exceptions=True)

    *refused, good = run(checkpoint, use, gguf_type="f32")
    assert all(isinstance(r, EmbedsError) for r in refused) and good.token_ids == expected[1]


def test_cancelled_requests_leave_the_engine_well(checkpoint, reference):
    embeds, expected = reference

    async def use(engine):
        tasks = [asyncio.create_task(engine.generate(row, Sampling(TOKENS, ignore_eos=True))) for row in embeds[:40]]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        stream = engine.stream(embeds[0], Sampling(TOKENS))
        await anext(stream)
        await stream.aclose()
        return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds[:9]))

    assert [c.token_ids for c in run(checkpoint, use, 8, gguf_type="f32")] == expected[:9]


def test_requests_that_a_close_interrupts_fail(checkpoint, reference):
    """Those under way and those that wait; a second close, and one while the model loads, end well too."""
    embeds, _ = reference

    async def use(engine):
        sampling = Sampling(TOKENS, ignore_eos=True)
        tasks = [asyncio.create_task(engine.generate(row, sampling)) for row in embeds[:8]]
        await asyncio.sleep(0.02)
        await engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineError, match=r"llama\.cpp has failed"):
            await engine.generate(embeds[0], sampling)
        return results

    results = run(checkpoint, use, 2)
    assert [str(r) for r in results if isinstance(r, EngineError)][-6:] == ["the engine was closed"] * 6

    async def loading():
        engine = LlamaCppEngine(LLMSpec.of(checkpoint), TOKENS, 1)
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        start.cancel()
        await engine.close()
        return engine

    assert not asyncio.run(loading()).alive


def test_logits_that_are_not_finite_fail_one_request(checkpoint, reference, tmp_path):
    shutil.copytree(checkpoint.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("t2i"))
    file = tmp_path / "copy" / "llm" / "model.safetensors"
    weights = {name: value.float() for name, value in load_file(file).items()}
    weights["model.norm.weight"] *= 3e37
    save_file(weights, file)

    async def use(engine):
        with pytest.raises(EmbedsError, match="logits are not finite"):
            await engine.generate(reference[0][0], Sampling(TOKENS))
        return engine.alive

    assert run(Checkpoint.open(tmp_path / "copy"), use, gguf_type="f32")


@pytest.mark.parametrize("case", ["other weights", "other width", "no file", "no text"])
def test_files_that_do_not_fit_are_refused(case, checkpoint, tmp_path):
    llm, file = Path(shutil.copytree(checkpoint.llm, tmp_path / "llm")), tmp_path / "x.gguf"
    if case == "other weights":
        weights = load_file(llm / "model.safetensors")
        weights["model.norm.weight"] *= 2
        save_file(weights, llm / "model.safetensors")
        write_gguf(llm, file, "f16")
        words = "was made from another language model: make it again with export.gguf"
    elif case == "other width":
        config = Qwen2Config(
            vocab_size=455, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(llm)
        write_gguf(llm, file, "f16")
        file.write_bytes(file.read_bytes().replace(b"vlv.source", b"xyz.source"))  # as one from elsewhere
        words = "takes embeddings of width 64 and has 455 tokens, the checkpoint 128 and 455"
    elif case == "no text":
        file.write_bytes(b"GGUF")
        words = r"llama\.cpp cannot load .*x\.gguf"
    else:
        words = r"llama\.cpp cannot load .*x\.gguf: .*(No such file|failed to open)"
    with pytest.raises(EngineError, match=words):
        run(checkpoint, None, gguf=file)


def test_a_file_is_taken_as_it_is_given(checkpoint, reference, cache, tmp_path):
    embeds, expected = reference
    write_gguf(checkpoint.llm, tmp_path / "mine.gguf", "f32")
    before = sorted(cache.rglob("*"))

    async def use(engine):
        return await engine.generate(embeds[0], Sampling(TOKENS))

    assert run(checkpoint, use, gguf=tmp_path / "mine.gguf").token_ids == expected[0]
    assert sorted(cache.rglob("*")) == before


def test_options_of_other_engines_are_refused(checkpoint):
    for options, flag in (({"lora": Path("x")}, "--lora"), ({"dtype": "bfloat16"}, "--llm-dtype")):
        with pytest.raises(OptionError, match=f"{flag} does not go with --engine llamacpp"):
            LlamaCppEngine(LLMSpec.of(checkpoint), TOKENS, 1, options=Options(**options))


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "temperature": 0.7}]
)
def test_draws_follow_the_probabilities_of_transformers(fields):
    """10,000 draws against the probabilities that transformers' warpers leave, in total variation."""
    sampling = Sampling(**{"temperature": 1.3, **fields})
    logits = np.random.default_rng(0).normal(size=60).astype(np.float32) * 2
    scores = torch.from_numpy(logits)[None] / sampling.temperature
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    job = _Job(np.zeros((1, 1)), sampling, False, np.random.default_rng(1))
    count = Counter(choose(logits, int(logits.argmax()), job, (0,)) for _ in range(10_000))
    drawn = np.array([count[i] for i in range(60)]) / 10_000
    assert not drawn[expected == 0].any()
    assert np.abs(drawn - expected).sum() / 2 < 0.03


def test_the_command_captions_images(captioning_checkpoint, scene_images, tmp_path, capsys):
    """Equal captions to the reference engine's, and records that tell the type; it is refused for another engine."""
    args = [str(scene_images), "--ckpt", str(captioning_checkpoint), "--limit", "8", "--max-tokens", str(TOKENS)]
    records = {}
    for engine, more in (("llamacpp", ["--gguf-type", "f32"]), ("transformers", [])):
        output = tmp_path / f"{engine}.jsonl"
        assert main([*args, "--engine", engine, "-o", str(output), *more]) == 0, capsys.readouterr().err
        records[engine] = {r["id"]: r for r in map(json.loads, output.read_text().splitlines())}
    captions = [{key: r["caption"] for key, r in records[engine].items()} for engine in records]
    assert captions[0] == captions[1] and len(captions[0]) == 8
    assert {r["flags"] for r in records["llamacpp"].values()} == {f"--max-tokens {TOKENS} --gguf-type f32"}
    assert main([*args, "--engine", "transformers", "--gguf-type", "f32", "-o", str(tmp_path / "x.jsonl")]) == 2
    assert "--gguf-type does not go with --engine transformers" in capsys.readouterr().err
