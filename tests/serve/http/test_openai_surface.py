"""Test what real OpenAI clients send beyond the plain request, and what they read from responses."""

from __future__ import annotations

import asyncio
import base64
import json
import re

import httpx
import openai
import pytest

from serve.http import openai_api as api
from serve.http.auth import Keys
from serve.http.errors import ApiError
from serve.http.web.page import OPENAPI
from tests.serve.serving import CLEAN, TEXT, Running, Scripted
from vlv.checkpoints.folder import Checkpoint


class LLMEngine(Scripted):
    """Record what requests ask for; know log probabilities, as vLLM's engine does."""

    has_logprobs = True
    samplings = []  # noqa: RUF012

    async def tokens(self, embeds, sampling, every):
        from serve.engines.sampling import Tokens

        type(self).samplings.append(sampling)
        async for ids in super().tokens(embeds, sampling, every):
            values = [{token: -0.25, token + 1: -1.5} for token in ids]
            yield Tokens(ids, values if sampling.logprobs is not None else None)


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine, cors=("https://app.example.org",))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def image(scene_images) -> bytes:
    return (scene_images / "00.png").read_bytes()


@pytest.fixture(scope="module")
def body(image) -> dict:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


HARMLESS = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "service_tier": "auto",
    "store": True,
    "metadata": {"a": "b"},
    "user": "me",
    "logit_bias": {},
    "reasoning_effort": "low",
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "modalities": ["text"],
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "verbosity": "low",
}


def test_harmless_fields_change_nothing(client, body):
    """Alone and all together; by OpenAI's own client, which checks their types."""
    for fields in ({}, HARMLESS, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}):
        answer = client.chat.completions.create(model="tiny", **body, **fields)
        assert answer.choices[0].message.content == CLEAN


def test_sampling_reaches_the_engine(client, body):
    more = {"top_k": 5, "min_p": 0.1, "ignore_eos": True, "min_tokens": 3, "repetition_penalty": 1.0}
    client.chat.completions.create(model="tiny", **body, temperature=0.7, top_p=0.9, seed=4, extra_body=more)
    sampling = LLMEngine.samplings[-1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 5, 0.1)
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.seed) == (True, 3, 4)
    for none in (0, -1):
        client.chat.completions.create(model="tiny", **body, extra_body={"top_k": none})
        assert LLMEngine.samplings[-1].top_k == 0


def test_more_tokens_than_possible_are_clamped_and_said(server, client, body):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = httpx.post(server.url + "/v1/chat/completions", json={**body, field: 400}, timeout=30)
        assert answer.status_code == 200 and answer.headers["X-VLV-Max-Tokens"] == "100"
        assert LLMEngine.samplings[-1].max_tokens == 100
        answer = httpx.post(server.url + "/v1/chat/completions", json={**body, field: 100}, timeout=30)
        assert answer.status_code == 200 and "X-VLV-Max-Tokens" not in answer.headers
    raw = client.chat.completions.with_raw_response.create(model="tiny", **body, max_tokens=400)
    assert raw.headers["X-VLV-Max-Tokens"] == "100" and raw.parse().choices[0].message.content == CLEAN


@pytest.mark.parametrize("temperature", [0, 1])
def test_several_choices(client, body, temperature):
    """Greedy ones are equal, and written once; drawn ones have seeds of their own, which no other request has."""
    drawn = []
    for seed in (5, 6, 7):
        before = len(LLMEngine.samplings)
        answer = client.chat.completions.create(model="tiny", **body, n=3, temperature=temperature, seed=seed)
        assert [(c.index, c.message.content) for c in answer.choices] == [(i, CLEAN) for i in range(3)]
        seeds = [sampling.seed for sampling in LLMEngine.samplings[before:]]
        assert seed in seeds and len(seeds) == (3 if temperature else 1)
        drawn += seeds
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("raw", [False, True])
def test_streamed_choices(client, body, temperature, raw):
    texts, reasons = {0: "", 1: "", 2: ""}, {}
    stream = client.chat.completions.create(
        model="tiny", **body, n=3, temperature=temperature, stream=True, extra_body={"raw": raw}
    )
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert set(texts.values()) == {TEXT if raw else CLEAN} and reasons == dict.fromkeys(range(3), "length")


def test_streamed_json(client, body):
    kind = {"type": "json_object"}
    stream = client.chat.completions.create(model="tiny", **body, response_format=kind, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text) == {"caption": CLEAN}


def events(server, body, **fields) -> list[dict]:
    answer = httpx.post(server.url + "/v1/chat/completions", json={**body, "stream": True, **fields}, timeout=30)
    *parts, end, nothing = answer.text.split("\n\n")
    assert end == "data: [DONE]" and nothing == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_usage_in_chunks(server, body):
    assert not any("usage" in event for event in events(server, body))
    *chunks, last = events(server, body, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 20
    *chunks, last = events(server, body, raw=True, stream_options={"continuous_usage_stats": True})  # as vLLM has it
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and len(set(counts)) > 20 and counts[-1] == last["usage"]["completion_tokens"]


def test_logprobs(client, body):
    fields = {"logprobs": True, "top_logprobs": 1, "extra_body": {"raw": True}}
    choice = client.chat.completions.create(model="tiny", **body, **fields).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == TEXT and {entry.logprob for entry in content} == {-0.25}
    assert bytes(content[0].bytes).decode() == content[0].token
    assert all([top.logprob for top in entry.top_logprobs] == [-0.25] for entry in content)
    for raw in (True, False):  # a cleaned stream carries those of dropped tokens too
        fields["extra_body"] = {"raw": raw}
        stream = client.chat.completions.create(model="tiny", **body, **fields, stream=True)
        parts = [part for chunk in stream if chunk.choices[0].logprobs for part in chunk.choices[0].logprobs.content]
        assert "".join(part.token for part in parts) == TEXT
    plain = client.chat.completions.create(model="tiny", **body).choices[0]
    assert plain.logprobs is None


def test_models(client):
    model = client.models.retrieve("tiny")
    assert model.id == "tiny" and model.to_dict() == client.models.list().data[0].to_dict()
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("some/other")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_request_ids(server, client, body):
    url = server.url + "/v1/chat/completions"
    for given, kept in (("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)):
        answer = httpx.post(url, json=body, headers={"X-Request-Id": given}, timeout=30)
        assert (answer.headers["X-Request-Id"] == given) is kept and answer.headers["X-Request-Id"]
    for answer in (httpx.get(server.url + "/health"), httpx.post(url, json={}), httpx.get(server.url + "/absent")):
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[], extra_headers={"X-Request-Id": "mine"})
    assert error.value.request_id == "mine"


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"temperature": 5}, 400, "temperature", "invalid_value"),
        ({"presence_penalty": 1}, 400, "presence_penalty", "unsupported_parameter"),
        ({"something": 1}, 400, "something", "unsupported_parameter"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"model": "other"}, 404, "model", "model_not_found"),
    ],
)
def test_errors_as_openai_has_them(server, body, fields, status, param, code):
    answer = httpx.post(server.url + "/v1/chat/completions", json={**body, **fields}, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (
        status,
        "invalid_request_error",
        param,
        code,
    )


def test_keys_and_rates(captioning_checkpoint, body, tmp_path):
    key = Keys.add(tmp_path / "keys.json", "me", per_minute=2)
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine, keys=Keys.load(tmp_path / "keys.json"))
    try:
        url, headers = running.url + "/v1/chat/completions", {"Authorization": f"Bearer {key}"}
        for answer in (httpx.post(url, json=body), httpx.get(running.url + "/v1/models")):
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        left = []
        for _ in range(2):
            answer = httpx.post(url, json=body, headers=headers, timeout=30)
            assert answer.status_code == 200 and answer.headers["x-ratelimit-limit-requests"] == "2"
            left.append(answer.headers["x-ratelimit-remaining-requests"])
        assert left == ["1", "0"]
        answer = httpx.post(url, json=body, headers=headers, timeout=30)
        assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0" and int(answer.headers["Retry-After"]) > 20
        assert 20 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        limited = openai.OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.RateLimitError, match="more than 2 images a minute"):
            limited.chat.completions.create(model="tiny", **body)
    finally:
        running.stop()


def test_cors_for_listed_origins_only(server, body):
    url = server.url + "/v1/chat/completions"
    for origin, allowed in (("https://app.example.org", True), ("https://evil.example.org", False)):
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        answer = httpx.options(url, headers={"Origin": origin, **ask})
        assert (answer.headers.get("Access-Control-Allow-Origin") == origin) is allowed
        answer = httpx.post(url, json=body, headers={"Origin": origin}, timeout=30)
        assert (answer.headers.get("Access-Control-Allow-Origin") == origin) is allowed
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]


def test_an_image_as_the_body(server, image):
    for kind in ("image/png", "application/octet-stream", "image/jpeg"):  # what it is, its content says
        answer = httpx.post(
            server.url + "/v1/captions?max_tokens=20&raw=true", content=image, headers={"Content-Type": kind}
        )
        (result,) = answer.json()["captions"]
        assert result["tokens"] == 20 and TEXT.startswith(result["caption"])
    answer = httpx.post(server.url + "/v1/captions", content=b"text", headers={"Content-Type": "image/png"})
    assert answer.status_code == 200 and answer.json()["captions"][0]["error"]["code"] == "image"
    answer = httpx.post(server.url + "/v1/captions?n=x", content=image, headers={"Content-Type": "image/png"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


def test_the_description_has_every_route_and_field(server, body):
    assert httpx.get(server.url + "/openapi.json").json() == OPENAPI
    for path, methods in OPENAPI["paths"].items():
        status = {
            m: httpx.request(m, server.url + path.replace("{model}", "tiny"), timeout=30).status_code for m in methods
        }
        assert not {404, 405} & set(status.values()), (path, status)
    fields = OPENAPI["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, field in fields["properties"].items():
        if name in api.IGNORED:
            continue
        refused = "x" if field.get("type") in ("integer", "number", "boolean") else 0
        with pytest.raises(ApiError, match=name):  # it is read: a wrong value is refused by name, as a value
            api.caption_params({name: refused}, 100, True)
        if "default" in field:
            api.caption_params({name: field["default"]}, 100, True)
    page = httpx.get(server.url + "/docs")
    assert "POST /v1/captions" in page.text and not re.search("https?://", page.text)


def test_the_description_is_valid():
    jsonschema = pytest.importorskip("jsonschema")
    schemas = [
        content["schema"]
        for methods in OPENAPI["paths"].values()
        for about in methods.values()
        for content in about.get("requestBody", {}).get("content", {}).values()
    ]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    assert len(schemas) >= 6


def test_the_log(capsys):
    """Failed requests, or with --access-log all; no line can be forged, and a flood is cut."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from serve.http.app import MAX_LINES, RequestLog

    def fail(request):
        request.scope["vlv"].error = "not\nso"
        return PlainTextResponse("no", 400)

    routes = [Route("/fine", lambda request: PlainTextResponse("yes")), Route("/ready", fail), Route("/{x:path}", fail)]

    def log(all: bool, *paths: str) -> list[str]:
        async def run() -> None:
            transport = httpx.ASGITransport(RequestLog(Starlette(routes=routes), all))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                for path in paths:
                    await client.get(path, headers={"X-Request-Id": "one two"})

        asyncio.run(run())
        return capsys.readouterr().err.splitlines()

    first, second = log(False, "/fine", "/ready", "/x", "/x%0Aforged")
    assert re.fullmatch(r"\S+Z 127.0.0.1 GET /x 400 \d+ms id=[0-9a-f]{32}: not so", first)
    assert re.fullmatch(r"\S+Z 127.0.0.1 GET /x\\nforged 404 \d+ms id=[0-9a-f]{32}", second)
    assert [line.split()[3] for line in log(True, "/fine", "/ready", "/x")] == ["/fine", "/ready", "/x"]
    lines = log(False, *["/x"] * 3 * MAX_LINES)
    assert MAX_LINES <= len(lines) <= 2 * MAX_LINES + 1  # in one second, or at the end of one
    assert len(log(True, *["/x"] * 3 * MAX_LINES)) == 3 * MAX_LINES
