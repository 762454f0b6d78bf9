"""Test the server with its clients: OpenAI's, curl and plain HTTP; errors, limits, and released resources."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from serve.http.app import Bounds
from serve.http.auth import Keys
from tests.serve.serving import CLEAN, TEXT, Running, Scripted
from vlv.checkpoints.folder import Checkpoint


class LLMEngine(Scripted):
    """Counters of this module's server."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A file of keys, and the keys themselves."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {
        name: Keys.add(file, name, **limits)
        for name, limits in {
            "main": {},
            "slow": {"per_minute": 2},
            "narrow": {"concurrent": 2},
        }.items()
    }
    return file, made


@pytest.fixture(scope="module")
def server(captioning_checkpoint, keys):
    bounds = Bounds(deadline=4, body_seconds=1, body_bytes=2 << 20, images=4)
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine, 6, Keys.load(keys[0]), None, bounds)
    yield running
    running.stop()


@pytest.fixture
def pace():
    """Set the engine's seconds a token for one test."""
    yield lambda seconds: setattr(LLMEngine, "pace", seconds)
    LLMEngine.pace = 0.001


@pytest.fixture
def post(server, keys):
    def send(path, key="main", **options):
        headers = {"Authorization": f"Bearer {keys[1].get(key, key)}"}
        return httpx.post(server.url + path, headers=headers, timeout=30, **options)

    return send


@pytest.fixture(scope="module")
def client(server, keys):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=keys[1]["main"], max_retries=0)


@pytest.fixture(scope="module")
def image(scene_images) -> str:
    """A data: URL."""
    return data_url((scene_images / "00.png").read_bytes())


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def message(url: str) -> list[dict]:
    parts = [{"type": "text", "text": "Describe it."}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]


def idle(server) -> bool:
    """Wait until nothing is being written and every lease is released."""
    for _ in range(100):
        if LLMEngine.running == 0 and server.routes.admission.active == 0:
            return True
        time.sleep(0.02)
    return False


def test_openai_chat(client, image):
    answer = client.chat.completions.create(model="tiny", messages=message(image))
    assert answer.choices[0].message.content == CLEAN and answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 20
    raw = client.chat.completions.create(model="tiny", messages=message(image), extra_body={"raw": True})
    assert raw.choices[0].message.content == TEXT
    options = {"stop": [" dog", "x"], "max_tokens": 90, "seed": 3, "temperature": 0.5, "user": "me"}
    stopped = client.chat.completions.create(model="tiny", messages=message(image), **options)
    # cut at its last period, as published: "It is red!" and "A" are after it
    assert stopped.choices[0].message.content == "The image shows a cat. It is red!"
    assert stopped.choices[0].finish_reason == "stop"
    kind = {"type": "json_object"}
    as_json = client.chat.completions.create(model="tiny", messages=message(image), response_format=kind)
    assert json.loads(as_json.choices[0].message.content) == {"caption": CLEAN}
    several = client.chat.completions.create(model="tiny", messages=message(image), n=3, temperature=1)
    assert [c.message.content for c in several.choices] == [CLEAN] * 3 and [c.index for c in several.choices] == [
        0,
        1,
        2,
    ]


def test_openai_stream(client, image):
    for extra, expected in (({}, CLEAN), ({"raw": True}, TEXT)):
        stream = client.chat.completions.create(
            model="tiny",
            messages=message(image),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].usage.completion_tokens > 20 and not chunks[-1].choices
        assert len(chunks) > (20 if extra else 4)  # as it is written, by token or by sentence


def test_openai_embeddings(client, server, image, scene_images):
    import torch

    from vlv.data.image import load_crop

    encoder = server.service.checkpoint.load_encoder()
    files = [scene_images / "00.png", scene_images / "01.png"]
    crops = np.stack([load_crop(f, encoder.config.image_size) for f in files])
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(crops)).flatten(1)
    urls = [data_url(f.read_bytes()) for f in files]
    # float32 sums in another batch may differ by their rounding: about sqrt(terms) x 6e-8 of the values' size
    tolerance = 1e-5 * float(expected.abs().max())
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="tiny", input=urls, **encoding)
        for entry, row in zip(answer.data, expected, strict=True):
            values = entry.embedding
            if isinstance(values, str):
                values = np.frombuffer(base64.b64decode(values), "<f4")
            assert np.abs(np.asarray(values) - row.numpy()).max() <= tolerance
            assert entry.shape == [encoder.config.queries, encoder.config.llm_width]


def test_openai_errors(client, image, server, keys):
    wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
    for error, call in {
        openai.AuthenticationError: lambda: wrong.models.list(),
        openai.NotFoundError: lambda: client.chat.completions.create(model="other", messages=message(image)),
        openai.BadRequestError: lambda: client.chat.completions.create(model="tiny", messages=[]),
    }.items():
        with pytest.raises(error):
            call()
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert keys[1]["main"] not in keys[0].read_text() and keys[0].stat().st_mode & 0o77 == 0


def test_curl(server, keys, image, scene_images, tmp_path):
    def curl(*args):
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {keys[1]['main']}", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    (tmp_path / "chat.json").write_text(json.dumps({"model": "tiny", "messages": message(image), "stream": True}))
    lines = curl(f"{server.url}/v1/chat/completions", "-d", f"@{tmp_path}/chat.json").split("\n\n")
    assert lines[-2] == "data: [DONE]" and json.loads(lines[0][6:])["choices"][0]["delta"]["role"] == "assistant"
    (tmp_path / "broken.png").write_bytes(b"not an image")
    files = [scene_images / "00.png", tmp_path / "broken.png", scene_images / "01.png"]
    forms = [part for f in files for part in ("-F", f"file=@{f}")]
    results = json.loads(curl(f"{server.url}/v1/captions", *forms, "-F", "max_tokens=20", "-F", "raw=true"))["captions"]
    assert [r["index"] for r in results] == [0, 1, 2] and results[0]["tokens"] == results[2]["tokens"] == 20
    assert results[0]["filename"] == "00.png" and TEXT.startswith(results[0]["caption"])
    assert "not recognised as an image" in results[1]["error"]["message"]
    (upper,) = json.loads(
        curl(f"{server.url}/v1/captions", "-H", "Content-Type: IMAGE/PNG", "--data-binary", f"@{files[0]}")
    )["captions"]
    assert upper["caption"] == CLEAN
    assert "<title>VLV captions" in curl(server.url)
    metrics = curl(f"{server.url}/metrics")
    for line in ('vlv_requests_total{route="/v1/captions",status="200"} 2.0', "vlv_ready 1.0", "vlv_active_images 0.0"):
        assert line in metrics


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "no JSON"),
        (b"[1]", 400, "a JSON object"),
        (b"[" * 100_000, 400, "no JSON"),
        ({"messages": "x"}, 400, "a list of messages"),
        ({"messages": [{"role": "user", "content": "not an image"}]}, 400, "must hold one image_url, not 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]}, 400, "a url"),
        ({"max_tokens": 0}, 400, "max_tokens must be an integer from 1 to"),
        ({"max_tokens": "many"}, 400, "max_tokens must be an integer from 1 to"),
        ({"temperature": "hot"}, 400, "temperature must be a number from 0 to 2, not 'hot'"),
        ({"temperature": float("nan")}, 400, "temperature must be"),
        ({"stop": [""]}, 400, "stop must be"),
        ({"n": 17, "temperature": 1}, 400, "n must be an integer from 1 to 16"),
        ({"stream": 1}, 400, "stream must be true or false"),
        ({"stream": True, "stream_options": 1}, 400, "stream_options must be an object"),
        ({"n": 7, "temperature": 1, "url": "data:,not an image"}, 400, "7 captions in one request: at most 6"),
        ({"seed": True}, 400, "seed must be an integer"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported here (this model calls no tools)"),
        ({"tool_choice": "required"}, 400, "tool_choice is not supported here (this model calls no tools)"),
        ({"top_p": 0}, 400, "top_p must be a number from 1e-06 to 1, not 0"),
        ({"top_p": True}, 400, "top_p must be a number"),
        ({"top_k": 0.5}, 400, "top_k must be an integer"),
        ({"min_p": 2}, 400, "min_p must be a number from 0 to 1"),
        ({"min_tokens": 60, "max_tokens": 50}, 400, "min_tokens must be an integer from 0 to 50, not 60"),
        ({"ignore_eos": "no"}, 400, "ignore_eos must be true or false"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported here (penalties count the tokens of the"),
        ({"presence_penalty": -1}, 400, "presence_penalty is not supported here (penalties count"),
        ({"repetition_penalty": 1.1}, 400, "repetition_penalty is not supported here (penalties count"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported here"),
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs is not supported here: leave it out"),
        ({"prompt_logprobs": 0}, 400, "prompt_logprobs is not supported here: leave it out"),
        ({"logprobs": True}, 400, "logprobs need --engine vllm"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"guided_json": {}}, 400, "guided_json is not supported here: leave it out"),
        ({"response_format": {"type": "json_schema"}}, 400, "follows no schema"),
        ({"raw": "yes"}, 400, "raw must be"),
        ({"url": "data:image/png;base64,!!"}, 400, "no base64"),
        ({"url": "data:image/png"}, 400, "no comma"),
        ({"\ud800": 1}, 400, "? is not supported here: leave it out"),
        ({"url": "data:,hello"}, 400, "not recognised as an image"),
        ({"url": "http://example.org/x.png"}, 400, "fetches no images from example.org"),
        ({"url": "file:///etc/passwd"}, 400, "images come as data: URLs"),
        (b"x" * (3 << 20), 413, "more than 2 MiB"),
    ],
)
def test_refused_in_one_sentence(post, image, server, body, status, words):
    if isinstance(body, dict):
        body = dict(body)
        body = json.dumps({"messages": message(body.pop("url", image)), **body}).encode()
    answer = post("/v1/chat/completions", content=body)
    assert answer.status_code == status, answer.text
    told = answer.json()["error"]
    assert words in told["message"] and "\n" not in told["message"] and "Traceback" not in answer.text
    assert idle(server)


def test_a_bomb_costs_nothing(post, bomb):
    answer = post("/v1/captions", json={"images": [data_url(bomb(30_000, 30_000)), data_url(bomb(1001, 1000))]})
    for result in answer.json()["captions"]:
        assert "more than the limit of 1,000,000" in result["error"]["message"] or "announces" in str(result)


def test_a_body_without_end_or_length(server, keys):
    def endless():
        while True:
            yield b"x" * 65536

    headers = {"Authorization": f"Bearer {keys[1]['main']}"}
    try:
        answer = httpx.post(server.url + "/v1/captions", content=endless(), headers=headers, timeout=20)
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # closed while we were still writing

    def trickle():
        for _ in range(40):
            yield b" "
            time.sleep(0.1)

    try:
        answer = httpx.post(server.url + "/v1/captions", content=trickle(), headers=headers, timeout=20)
        assert answer.status_code == 408 and "did not arrive within 1 s" in answer.text
    except httpx.WriteError:
        pass
    assert idle(server)


def test_rates_and_concurrency_of_a_key(post, image, pace):
    statuses = [post("/v1/captions", "slow", json={"images": [image]}) for _ in range(3)]
    assert [a.status_code for a in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[2].headers["Retry-After"]) <= 30 and "a minute" in statuses[2].text
    assert post("/v1/captions", "narrow", json={"images": [image] * 3}).status_code == 400  # never possible
    assert post("/v1/captions", "narrow", json={"images": [image] * 2}).status_code == 200


def test_several_captions_of_several_images_are_admitted_together(post, image):
    """Or not at all, and not one after another once the work has begun."""
    answer = post("/v1/captions", json={"images": [image] * 4, "n": 2, "temperature": 1})
    assert answer.status_code == 400 and "8 captions in one request: at most 6" in answer.text
    answer = post("/v1/captions", json={"images": [image] * 3, "n": 2, "temperature": 1})
    assert answer.status_code == 200 and len(answer.json()["captions"]) == 3


def test_overload_is_refused_at_once(post, image, pace, server):
    pace(0.02)
    answers = []

    def ask():
        start = time.monotonic()
        answers.append((post("/v1/captions", json={"images": [image]}), time.monotonic() - start))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [(a, seconds) for a, seconds in answers if a.status_code == 503]
    assert sum(a.status_code == 200 for a, _ in answers) >= 6 and len(refused) >= 8
    assert all(int(a.headers["Retry-After"]) >= 1 for a, _ in refused) and idle(server)


def test_the_deadline_cancels_the_caption(post, image, pace, server):
    pace(0.5)
    before = LLMEngine.cancelled
    answer = post("/v1/captions", json={"images": [image]})
    assert answer.status_code == 504 and "not done within 4 s" in answer.text and idle(server)
    assert LLMEngine.cancelled == before + 1
    answer = post("/v1/chat/completions", json={"messages": message(image), "stream": True, "raw": True})
    assert answer.status_code == 200 and "deadline" in answer.text and "[DONE]" not in answer.text and idle(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_releases_its_lease(server, keys, image, pace, stream):
    pace(0.1)
    before, headers = LLMEngine.cancelled, {"Authorization": f"Bearer {keys[1]['main']}"}
    body = {"messages": message(image), "stream": stream, "raw": True}
    url, leaving = server.url + "/v1/chat/completions", (httpx.ReadTimeout, KeyboardInterrupt)
    with pytest.raises(leaving), httpx.stream("POST", url, json=body, headers=headers, timeout=1) as answer:
        next(answer.iter_lines())
        raise KeyboardInterrupt  # read one line, and leave
    assert idle(server) and LLMEngine.cancelled == before + 1


def test_an_engine_that_dies_is_started_again(server, post, image, pace):
    pace(0.05)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(post("/v1/captions", json={"images": [image]})))
    asking.start()
    while not LLMEngine.running:
        time.sleep(0.01)
    starts, server.service.engine.dead = LLMEngine.starts, True
    asking.join()
    assert answers[0].status_code == 503 and "Retry-After" in answers[0].headers
    for _ in range(100):
        if server.is_ready() and LLMEngine.starts == starts + 1:
            break
        time.sleep(0.05)
    pace(0.001)
    assert post("/v1/captions", json={"images": [image]}).json()["captions"][0]["caption"] == CLEAN
    assert "vlv_engine_restarts_total 1.0" in httpx.get(server.url + "/metrics").text


def test_draining_refuses_what_is_new(server, post, image):
    server.routes.draining = True
    answer = post("/v1/captions", json={"images": [image]})
    server.routes.draining = False
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "5"
