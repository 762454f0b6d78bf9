"""Embeddings over the wire: to a stock vLLM server, and to the gateway in front of it. Both are real processes."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import save

from serve import vllm_caption
from serve.engines.base import EmbedsError, EngineError, LLMSpec, OptionError, Options, Sampling
from serve.engines.remote import RemoteEngine
from serve.engines.transformers import TransformersEngine
from serve.http.gateway import HEADER
from vlv.checkpoints.folder import Checkpoint

ROOT = Path(__file__).parents[3]
TOKENS, COUNT = 32, 8
QUERIES = Checkpoint.open(ROOT / "assets/vlv-tiny").config.queries


@pytest.fixture(scope="module")
def checkpoint(captioning_checkpoint) -> Checkpoint:
    return Checkpoint.open(captioning_checkpoint)


@pytest.fixture(scope="module")
def embeds(checkpoint, scene_images):
    """As they travel: rounded to bfloat16; [COUNT, queries, width]."""
    import numpy as np

    from vlv.data.image import load_crop

    files = [scene_images / f"{i:02}.png" for i in range(COUNT)]
    crops = np.stack([load_crop(f, checkpoint.config.image_size) for f in files])
    with torch.inference_mode():
        return checkpoint.load_encoder()(torch.from_numpy(crops)).bfloat16().float()


@pytest.fixture(scope="module")
def reference(checkpoint, embeds):
    engine = TransformersEngine(LLMSpec.of(checkpoint), TOKENS, COUNT)
    return asyncio.run(using(engine, lambda: generate(engine, embeds)))


async def generate(engine, embeds, **sampling):
    return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS, **sampling)) for row in embeds))


async def using(engine, work):
    """Start, work, close."""
    try:
        await engine.start()
        return await work()
    finally:
        await engine.close()


def process(*args, wait: str, seconds: float = 240, **env):
    """A server at a free port, once `wait` answers 200: (process, url)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *map(str, args), "--host", "127.0.0.1", "--port", str(port)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | env)
    os.set_blocking(run.stderr.fileno(), False)
    url, deadline, log = f"http://127.0.0.1:{port}", time.monotonic() + seconds, b""
    while True:
        log += run.stderr.read() or b""
        try:
            if httpx.get(url + wait).status_code == 200:
                return run, url
        except httpx.TransportError:
            pass
        assert run.poll() is None and time.monotonic() < deadline, log.decode()[-3000:]
        time.sleep(0.2)


def end(run: subprocess.Popen) -> None:
    run.terminate()
    try:
        run.wait(30)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
    run.stderr.close()


@pytest.fixture(scope="module")
def vllm(checkpoint):
    """A stock vLLM server of the checkpoint's llm/, by the command of docs/serving.md for a CPU."""
    page = (ROOT / "docs" / "serving.md").read_text()
    (command,) = re.findall(r"^python -m (vllm\.entrypoints\.openai\.api_server --model DIR/llm .*)$", page, re.M)
    words = shlex.split(command.replace("DIR/llm", str(checkpoint.llm)))
    run, url = process(*words, wait="/health", VLLM_NO_USAGE_STATS="1")
    yield url
    end(run)


@pytest.fixture(scope="module")
def behind(checkpoint, vllm):
    """The gateway's URL."""
    args = ("serve.gateway", "--ckpt", checkpoint.folder, "--llm-url", vllm, "--max-tokens", TOKENS)
    run, url = process(*args, wait="/ready")
    yield url
    end(run)


def engine_at(checkpoint, url: str) -> RemoteEngine:
    return RemoteEngine(LLMSpec.of(checkpoint), TOKENS, COUNT, options=Options(url=url))


@pytest.mark.parametrize("place", ["vllm", "behind"])
def test_the_same_tokens(place, checkpoint, embeds, reference, request):
    engine = engine_at(checkpoint, request.getfixturevalue(place))

    async def work():
        whole = await generate(engine, embeds)
        pieces = [piece async for piece in engine.stream(embeds[0], Sampling(TOKENS))]
        stopped = await engine.generate(embeds[0], Sampling(TOKENS, stop=(whole[0].text[10:14],)))
        drawn = [await engine.generate(embeds[1], Sampling(TOKENS, 1.0, seed)) for seed in (5, 5, 6)]
        with pytest.raises(EmbedsError):
            await engine.generate(embeds[0] * float("nan"), Sampling(TOKENS))
        return whole, pieces, stopped, drawn

    whole, pieces, stopped, drawn = asyncio.run(using(engine, work))
    assert sum(a == b for a, b in zip(whole, reference, strict=True)) >= COUNT - 1  # a near tie may fall otherwise
    assert "".join(p.text for p in pieces) == whole[0].text and len(pieces) > len(whole[0].token_ids) // 2
    assert pieces[-1].finish_reason == whole[0].finish_reason
    assert stopped.text == whole[0].text[: whole[0].text.index(whole[0].text[10:14])]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_command_captions_by_the_documented_server(vllm, captioning_checkpoint, scene_images, tmp_path):
    """The embeddings that --llm-url sends are taken."""
    words = ["--ckpt", captioning_checkpoint, "--llm-url", vllm, "--max-tokens", 15, "-o", tmp_path / "c.jsonl"]
    images = [scene_images / "00.png", scene_images / "01.png"]
    assert vllm_caption.main([str(word) for word in [*images, *words]]) == 0
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(record["caption"] and record["tokens"] == 15 for record in records)


def test_the_gateway_takes_nothing_but_sound_embeddings(behind, checkpoint, embeds):
    def post(body: bytes, **wish):
        headers = {HEADER: json.dumps(wish)}
        return httpx.post(behind + "/v1/generate", content=body, headers=headers, timeout=60)

    good = embeds[0].bfloat16()
    assert post(save({"embeds": good}), max_tokens=4).json()["choices"][0]["token_ids"]
    bad = good.clone()
    bad[3, 5] = torch.inf
    queries, width = good.shape
    pickled = pickle.dumps(good.float().numpy())
    for body, words in {
        b"": "no safetensors", pickled: "no safetensors", save({"embeds": good})[:-1]: "no safetensors",
        b"\xff" * 64: "no safetensors", save({"other": good}): "must hold one tensor, embeds",
        save({"embeds": good, "more": good[:1].clone()}): "must hold one tensor",
        save({"embeds": good[:-1].clone()}): f"takes float embeddings [{queries}, {width}]",
        save({"embeds": good[None].clone()}): "takes float embeddings",
        save({"embeds": torch.zeros(queries, width, dtype=torch.int16)}): "takes float embeddings",
        save({"embeds": bad}): "not finite",
    }.items():  # fmt: skip
        answer = post(body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert post(bytes(queries * width * 4 + 5000)).status_code == 413
    assert post(save({"embeds": good}), max_tokens=TOKENS + 1).status_code == 400
    headers = {HEADER: "[" * 5000}
    assert httpx.post(behind + "/v1/generate", content=save({"embeds": good}), headers=headers).status_code == 400
    for wish in ({"stop": ["x"]}, {"n": 2}, {"raw": True}, {"response_format": {"type": "text"}}, {"stream": 1}):
        answer = post(save({"embeds": good}), temperature=1, **wish)
        assert answer.status_code == 400 and next(iter(wish)) in answer.json()["error"]["message"], answer.text


def test_where_no_server_is(checkpoint):
    engine = engine_at(checkpoint, "http://127.0.0.1:9")
    engine.patience = 0
    with pytest.raises(EngineError, match=r"no language model at http://127\.0\.0\.1:9/v1"):
        asyncio.run(using(engine, lambda: None))
    with pytest.raises(OptionError, match="needs --llm-url"):
        RemoteEngine(LLMSpec.of(checkpoint), TOKENS, 1)
    with pytest.raises(OptionError, match="--llm-url localhost:8000: expected a URL such as http://localhost:8000"):
        engine_at(checkpoint, "localhost:8000")


def at_fake(checkpoint, work, model: dict, answer=None, with_body=None):
    """work(engine) with an engine at a server that has `model`; answer(head) -> (status, body), None to hang up.

    `with_body`: instead of `answer`, answer(head, body).
    """

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = [
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        ]
        body = await reader.readexactly(length[0] if length else 0)
        told = ("200 OK", {"data": [model]})
        if head.startswith(b"POST"):
            told = with_body(head, body) if with_body else answer(head)
        if told is not None:
            content = json.dumps(told[1]).encode()
            if b'"stream": true' in body:
                content = b"data: " + content + b"\n\n"
            head = f"HTTP/1.1 {told[0]}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        engine = engine_at(checkpoint, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/")
        async with server:
            return await using(engine, lambda: work(engine))

    return asyncio.run(main())


def test_busy_servers_are_asked_again(checkpoint, embeds, monkeypatch):
    """Two refusals, a broken connection, as many limits as there may be, then an answer."""
    requests = []
    monkeypatch.setenv("VLV_API_KEY", "secret")

    def answer(head):
        requests.append(head)
        if len(requests) < 3:
            return "503 Busy\r\nRetry-After: 0", {}
        if len(requests) == 3:
            return None
        if len(requests) < 13:
            return "429 Too Many Requests\r\nRetry-After: 0", {}
        return "200 OK", {"choices": [{"token_ids": [5, 6], "finish_reason": "length"}]}

    written = at_fake(checkpoint, lambda engine: engine.generate(embeds[0], Sampling(TOKENS)), {"id": "m"}, answer)
    assert written.token_ids == [5, 6] and len(requests) == 13
    assert all(b"authorization: bearer secret" in head.lower() for head in requests)


@pytest.mark.parametrize(
    ("status", "busy"),
    [
        ("429 Slow down\r\nRetry-After: 0.3", {"error": {"message": "slow"}}),
        ("429 Slow down\r\nRetry-After: DATE", {"error": {"message": "slow"}}),
        ("200 OK", {"error": {"message": "out of memory", "code": 500}}),
        ("200 OK", {"error": "overloaded"}),
        ("200 OK", ["busy"]),
        ("529 Overloaded", {"type": "error"}),
    ],
)
def test_answers_that_another_attempt_betters(checkpoint, embeds, status, busy):
    """Also a wait that is given as a date or with decimals, and errors in answers that claim success."""
    requests = []
    date = formatdate(time.time() + 2, usegmt=True)

    def answer(head):
        requests.append(time.monotonic())
        if len(requests) == 1:
            return status.replace("DATE", date), busy
        return "200 OK", {"choices": [{"token_ids": [5, 6], "finish_reason": "length"}]}

    written = at_fake(checkpoint, lambda engine: engine.generate(embeds[0], Sampling(TOKENS)), {"id": "m"}, answer)
    assert written.token_ids == [5, 6] and len(requests) == 2
    waited = requests[1] - requests[0]
    assert waited > 0.3 if "0.3" in status else waited > 0.9 if "DATE" in status else waited < 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_token_ids_is_refused(checkpoint, embeds, stream):
    """An older server ignores return_token_ids; its text is that of another tokenizer perhaps."""
    choice = {"index": 0, "text": "A fish.", "finish_reason": "stop"}

    async def work(engine):
        if stream:
            return [piece async for piece in engine.stream(embeds[0], Sampling(TOKENS))]
        return await engine.generate(embeds[0], Sampling(TOKENS))

    with pytest.raises(EngineError, match="answers without token_ids: expected a vLLM that"):
        at_fake(checkpoint, work, {"id": "m"}, lambda _: ("200 OK", {"choices": [choice]}))


def test_no_setting_is_left_to_the_server(checkpoint, embeds):
    """A server takes what a request leaves out from generation_config.json: penalties, top-k."""
    bodies = []

    def answer(head, body):
        bodies.append(json.loads(body))
        return "200 OK", {"choices": [{"token_ids": [5, 6], "finish_reason": "length"}]}

    at_fake(checkpoint, lambda engine: engine.generate(embeds[0], Sampling(TOKENS)), {"id": "m"}, with_body=answer)
    expected = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False}
    expected |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: bodies[0][name] for name in expected} == expected


def test_no_more_requests_at_a_time_than_in_flight(checkpoint, embeds):
    """A key's share would not allow them."""
    ids = {"choices": [{"token_ids": [5, 6], "finish_reason": "length"}]}
    open_at_once = []

    async def work(engine):
        connector = engine._session.connector

        async def one():
            await engine.generate(embeds[0], Sampling(TOKENS))
            open_at_once.append(len(connector._acquired))

        await asyncio.gather(*(one() for _ in range(4 * COUNT)))

    at_fake(checkpoint, work, {"id": "m"}, lambda _: ("200 OK", ids))
    assert max(open_at_once) <= COUNT


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"width": 5}, "takes embeddings of width 5"),
        ({"queries": 5}, "takes embeddings of queries 5"),
        ({"max_tokens": TOKENS - 1}, f"up to {TOKENS - 1} tokens a caption: give --max-tokens {TOKENS - 1} or less"),
        ({"max_model_len": 1 + QUERIES}, "up to 1 tokens a caption: give --max-tokens 1 or less"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(checkpoint, told, words):
    with pytest.raises(EngineError, match=words):
        at_fake(checkpoint, None, {"id": "m", **told})
