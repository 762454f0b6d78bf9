"""vLLM itself, started once for all tests here, against transformers' own generate."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm")

from serve.core.inputs import expand
from serve.core.run import CaptionRun, RunConfig
from serve.engines.base import EmbedsError, EngineError, LLMSpec, Options, Sampling
from serve.engines.vllm import VLLMEngine
from serve.outputs.jsonl import FileSink
from serve.reports.progress import Progress
from tests.serve.engines.test_sampling import (  # noqa: F401
    COUNT,
    Running,
    greedy,
    test_lengths,
    test_log_probabilities_are_the_models,
    test_sampling_that_leaves_one_token_is_greedy,
)
from vlv.checkpoints.folder import Checkpoint
from vlv.model.generation import cut_at_end

TOKENS = 48
ROOT = Path(__file__).parents[3]


class Shared(VLLMEngine):
    """An engine that a pipeline neither starts nor closes."""

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(captioning_checkpoint) -> Checkpoint:
    return Checkpoint.open(captioning_checkpoint)


@pytest.fixture(scope="module")
def loop():
    """An event loop that lives as long as the engine, in a thread; call it with a coroutine."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=300)
    loop.call_soon_threadsafe(loop.stop)


def command_line(process: psutil.Process) -> str:
    """Return a process's command line, empty for one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.fixture(scope="module")
def vllm(checkpoint, loop, tmp_path_factory):
    engine, folder = Shared(LLMSpec.of(checkpoint), TOKENS, 32), tmp_path_factory.mktemp("sockets")
    with pytest.MonkeyPatch.context() as patch:  # of this engine alone: others leave sockets in /tmp
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        loop(VLLMEngine.start(engine))
    yield engine
    children = psutil.Process().children(recursive=True)
    workers = [p for p in children if "VLLM" in command_line(p)]
    loop(VLLMEngine.close(engine))
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "vLLM's processes outlive close()"
    assert not [path.name for path in folder.iterdir() if path.is_socket() and not path.name.startswith("pymp")]


@pytest.fixture(scope="module")
def pixels(scene_images):
    """uint8 [64, 3, S, S]."""
    import numpy as np
    import torch

    from vlv.data.image import load_crop

    return torch.from_numpy(np.stack([load_crop(i.path, 64) for i in expand([str(scene_images)])]))


@pytest.fixture(scope="module")
def embeds(checkpoint, pixels):
    """The images' prompt embeddings [64, queries, width]."""
    import torch

    with torch.inference_mode():
        return checkpoint.load_encoder()(pixels)


@pytest.fixture(scope="module")
def reference(checkpoint, embeds) -> list[tuple[list[int], list[float]]]:
    """Per image what transformers' generate(inputs_embeds) writes, and by how much each token won."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(checkpoint.llm, dtype=torch.float32).eval()
    end = AutoTokenizer.from_pretrained(checkpoint.llm).eos_token_id
    out = llm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best, second = torch.stack(out.logits, 1).topk(2).values.unbind(-1)
    rows = [row[: row.index(end)] if end in row else row for row in out.sequences.tolist()]
    return list(zip(rows, (best - second).tolist(), strict=True))


@pytest.fixture(scope="module")
def generate(vllm, loop, embeds) -> Running:
    """Make the tests of test_sampling.py run with this engine."""
    return Running(vllm, loop, embeds[:COUNT])


def test_greedy_tokens_equal_transformers(vllm, loop, embeds, reference):
    async def generate():
        return await asyncio.gather(*(vllm.generate(row, Sampling(TOKENS)) for row in embeds))

    completions = loop(generate())
    ties = 0
    for completion, (tokens, margins) in zip(completions, reference, strict=True):
        if completion.token_ids != tokens:
            # random weights may leave two tokens closer than float32 sums in another order agree
            pairs = zip([*completion.token_ids, None], [*tokens, None], strict=False)
            first = next(i for i, (a, b) in enumerate(pairs) if a != b)
            assert margins[first] < 1e-3, f"differs at token {first}, won by {margins[first]}"
            ties += 1
        assert completion.finish_reason == ("length" if len(completion.token_ids) == TOKENS else "stop")
    assert ties <= 2 and len(completions) == 64
    assert len({tuple(c.token_ids) for c in completions}) > 32  # the captions do depend on the pictures


def test_captioner_and_both_engines_agree(vllm, loop, checkpoint, embeds, pixels, reference):
    from serve.engines.transformers import TransformersEngine
    from vlv.model.captioner import Captioner

    async def generate():
        engine = TransformersEngine(LLMSpec.of(checkpoint), TOKENS, 16)
        await engine.start()
        try:
            return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds[:16]))
        finally:
            await engine.close()

    captioner = Captioner.load(checkpoint)
    tokens = captioner.generate(pixels[:16], max_new_tokens=TOKENS)
    assert [c.token_ids for c in loop(generate())] == tokens == [tokens for tokens, _ in reference[:16]]


def test_sampling_follows_its_seed(vllm, loop, embeds):
    async def generate():
        seeds = [Sampling(TOKENS, temperature=1.0, seed=s) for s in (1, 1, 2)]
        return await asyncio.gather(*(vllm.generate(embeds[0], s) for s in seeds))

    one, again, other = (c.token_ids for c in loop(generate()))
    assert one == again != other


def test_streams_the_same(vllm, loop, embeds, reference):
    async def pieces(sampling):
        return [piece async for piece in vllm.stream(embeds[3], sampling)]

    whole = loop(vllm.generate(embeds[3], Sampling(TOKENS)))
    parts = loop(pieces(Sampling(TOKENS)))
    assert "".join(p.text for p in parts) == whole.text and len(parts) > len(whole.token_ids) // 2
    assert [i for p in parts for i in p.token_ids] == whole.token_ids
    assert [p.finish_reason for p in parts] == [""] * (len(parts) - 1) + [whole.finish_reason]
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = loop(vllm.generate(embeds[3], Sampling(TOKENS, stop=(stop,))))
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"


def test_a_lora_adapter_gives_the_captions_of_merged_weights(loop, checkpoint, embeds, reference, tmp_path):
    """An engine of its own, with an adapter on the queries' projections, against transformers with W + B A.

    One layer has a rank of its own, above that of the others (rank_pattern); with a vLLM that ignores it, the
    adapter is refused.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from vllm.lora.peft_helper import PEFTHelper

    has_patterns = hasattr(PEFTHelper, "get_rank_and_scaling")
    llm = AutoModelForCausalLM.from_pretrained(checkpoint.llm, dtype=torch.float32).eval()
    width, alpha, ranks, adapter = llm.config.hidden_size, 8, [4, 20 if has_patterns else 4, 4, 4], {}
    torch.manual_seed(1)
    with torch.no_grad():
        for i, layer in enumerate(llm.model.layers):
            name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
            projection, rank = layer.self_attn.q_proj.weight, ranks[i]
            adapter[f"{name}.lora_A.weight"] = a = torch.randn(rank, width) * width**-0.5
            adapter[f"{name}.lora_B.weight"] = b = torch.randn(len(projection), rank) * 0.5
            projection += alpha / rank * (b @ a)
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    description = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none"}
    pattern = {"rank_pattern": {"layers.1.self_attn.q_proj": 20}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(description | (pattern if has_patterns else {})))
    merged = llm.generate(
        inputs_embeds=embeds[:16], attention_mask=torch.ones(16, embeds.shape[1], dtype=torch.long),
        max_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
    ).tolist()  # fmt: skip
    options = Options(lora=tmp_path)
    engine = VLLMEngine(LLMSpec.of(checkpoint), TOKENS, 16, options=options)

    async def generate():
        try:
            await engine.start()
            return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds[:16]))
        finally:
            await engine.close()

    tokens = [c.token_ids for c in loop(generate())]
    expected = [cut_at_end(row, engine.ends) for row in merged]
    assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 15  # a near tie may fall the other way
    assert tokens != [tokens for tokens, _ in reference[:16]]
    if not has_patterns:
        (tmp_path / "adapter_config.json").write_text(json.dumps(description | pattern))
        engine = VLLMEngine(LLMSpec.of(checkpoint), TOKENS, 16, options=options)
        with pytest.raises(EngineError, match=r"layers of their own scale \(rank_pattern\)"):
            loop(generate())


def test_bfloat16_is_chosen_by_an_option(loop, checkpoint, embeds, reference):
    """An engine of its own: its captions begin as float32's do, and few are equal to their ends."""
    import torch

    engine = VLLMEngine(LLMSpec.of(checkpoint), TOKENS, 32, options=Options(dtype="bfloat16", placement="inline"))

    async def generate():
        try:
            await engine.start()
            assert engine._engine.model_config.dtype == torch.bfloat16
            return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds[:32]))
        finally:
            await engine.close()

    tokens = [c.token_ids for c in loop(generate())]
    common = [
        next((i for i, (a, b) in enumerate(zip(row, expected, strict=False)) if a != b), len(row))
        for row, (expected, _) in zip(tokens, reference, strict=False)
    ]
    assert tokens != [row for row, _ in reference[:32]] and sum(common) / len(common) > 5, common


def test_unusable_embeddings_are_refused_and_harm_nobody(vllm, loop, embeds, reference):
    async def generate():
        wrong = [embeds[0, :, :-1], embeds[0, :-1], embeds[:1], embeds[0] * float("inf"), embeds[0].long()]
        requests = (vllm.generate(row, Sampling(TOKENS)) for row in [*wrong, embeds[1]])
        return await asyncio.gather(*requests, return_exceptions=True)

    *refused, good = loop(generate())
    assert all(isinstance(r, EmbedsError) for r in refused)
    assert good.token_ids == reference[1][0]


def test_cancelled_requests_leave_the_engine_well(vllm, loop, embeds, reference):
    async def generate():
        tasks = [asyncio.create_task(vllm.generate(row, Sampling(TOKENS))) for row in embeds[:16]]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return await vllm.generate(embeds[2], Sampling(TOKENS))

    assert loop(generate()).token_ids == reference[2][0]


def test_files_to_captions(vllm, loop, checkpoint, scene_images, tmp_path, reference):
    """The whole road: files on disk, decode processes, encoder, vLLM, records."""
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    sink, progress = FileSink(tmp_path / "c.jsonl", checkpoint.hash), Progress()
    config = RunConfig(Sampling(TOKENS), prompt_batch=8, workers=1)
    paths = [str(scene_images), str(tmp_path / "broken.jpg")]
    loop(CaptionRun(checkpoint, vllm, sink, config, progress).run(expand(paths)))
    sink.close()
    records = {r["id"]: r for r in map(json.loads, (tmp_path / "c.jsonl").read_text().splitlines())}
    assert (progress.captioned, progress.failed) == (64, 1)
    counts = [records[item.id]["tokens"] for item in expand([str(scene_images)])]
    assert sum(n != len(tokens) for n, (tokens, _) in zip(counts, reference, strict=True)) <= 2


@pytest.fixture
def command(captioning_checkpoint, scene_images, tmp_path):
    """The command line in a process of its own, with the vLLM processes that it has started so far."""
    args = [scene_images, "--ckpt", captioning_checkpoint, "-o", tmp_path / "c.jsonl", "--max-tokens", str(TOKENS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.vllm_caption", *map(str, args)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    process.engines = lambda: [
        p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in command_line(p)
    ]
    yield process
    if process.poll() is None:
        process.kill()
    process.stderr.close()


def until(condition, seconds: float = 200):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return result


def engine_core(process):
    """vLLM's engine process, once there is one: a child with a good deal of memory."""
    return [p for p in process.engines() if p.memory_info().rss > 200 << 20]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_vllm_process_is_left_behind(command, ending):
    """Ctrl-C and kill -9 while vLLM is loading, when it watches its parent least."""
    until(lambda: engine_core(command))
    children = psutil.Process(command.pid).children(recursive=True)
    if ending == signal.SIGINT:
        os.killpg(command.pid, ending)  # as a terminal does
    else:
        command.kill()
    code = command.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive
    assert code == (130 if ending == signal.SIGINT else -9)
    if ending == signal.SIGINT:
        *_, last = command.stderr.read().splitlines()
        assert last.startswith("stopped by SIGINT: ")
