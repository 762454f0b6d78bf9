"""The field `crop` of requests: what the model sees, and where tiles are listed."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image, ImageOps

from serve.http.app import Bounds
from tests.serve.serving import CLEAN, TEXT, Running, Scripted
from vlv.checkpoints.folder import Checkpoint
from vlv.data.decoding.crop import PAD_COLOR


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), Scripted, 6, bounds=Bounds(images=4))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def wide() -> Image.Image:
    """An image of 128 x 64 pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8))


@pytest.fixture(scope="module")
def content(wide) -> bytes:
    stream = io.BytesIO()
    wide.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def url(content) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def post(server, path: str, body: dict) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=30)


def test_captions_list_the_tiles(server, content, url):
    boxes = [[0, 0, 64, 64], [32, 0, 96, 64], [64, 0, 128, 64]]
    answers = [
        post(server, "/v1/captions", {"images": url, "crop": "tiles"}),
        httpx.post(server.url + "/v1/captions?crop=tiles", content=content, headers={"Content-Type": "image/png"}),
        httpx.post(server.url + "/v1/captions", files={"file": ("a.png", content)}, data={"crop": "tiles"}),
    ]
    for answer in answers:
        (result,) = answer.json()["captions"]
        assert result["crop"] == "tiles" and [tile["box"] for tile in result["tiles"]] == boxes
        assert {tile["caption"] for tile in result["tiles"]} == {CLEAN}
        assert result["caption"] == CLEAN and result["finish_reason"] == "length"  # the same sentences stand once
    (one,) = post(server, "/v1/captions", {"images": url}).json()["captions"]
    assert "crop" not in one and "tiles" not in one and 3 * one["tokens"] == result["tokens"]
    (padded,) = post(server, "/v1/captions", {"images": url, "crop": "pad"}).json()["captions"]
    assert padded["crop"] == "pad" and "tiles" not in padded


def test_chat(server, url):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]

    def ask(crop: str, **options):
        return client.chat.completions.create(
            model="tiny", messages=messages, extra_body={"crop": crop, **options.pop("extra", {})}, **options
        )

    one, tiles = ask("center"), ask("tiles")
    assert tiles.choices[0].message.content == one.choices[0].message.content == CLEAN
    assert tiles.usage.total_tokens == 3 * one.usage.total_tokens
    assert ask("tiles", extra={"raw": True}).choices[0].message.content == " ".join([TEXT] * 3)
    chunks = list(ask("tiles", stream=True, stream_options={"include_usage": True}, n=2, temperature=1.0))
    for index in range(2):
        pieces = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(piece.delta.content or "" for piece in pieces) == CLEAN
        assert pieces[-1].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 2 * tiles.usage.completion_tokens


def test_embeddings_and_the_default_of_the_server(server, wide, url):
    encoder = server.service.checkpoint.load_encoder()
    seen = {
        "center": wide.crop((32, 0, 96, 64)),
        "pad": ImageOps.pad(wide, (64, 64), Image.Resampling.BILINEAR, PAD_COLOR),
        "squash": wide.resize((64, 64), Image.Resampling.BILINEAR),
    }
    with torch.inference_mode():
        pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in seen.values()])
        expected = dict(zip(seen, encoder(torch.from_numpy(pixels)).flatten(1).numpy(), strict=True))

    def embedding(**fields) -> np.ndarray:
        answer = post(server, "/v1/embeddings", {"input": url, **fields})
        return np.array(answer.json()["data"][0]["embedding"])

    tolerance = 1e-5 * max(np.abs(row).max() for row in expected.values())  # float32 sums in another batch
    for crop, row in expected.items():
        assert np.abs(embedding(crop=crop) - row).max() <= tolerance, crop
    try:
        for default, row in (("squash", expected["squash"]), ("tiles", expected["center"])):
            server.routes.crop = default
            assert np.abs(embedding() - row).max() <= tolerance
        (result,) = post(server, "/v1/captions", {"images": url}).json()["captions"]
        assert len(result["tiles"]) == 3
    finally:
        server.routes.crop = "center"


@pytest.mark.parametrize("wrong", ["middle", 0, ["pad"]])
def test_other_values_are_refused_by_name(server, url, wrong):
    for path, field in (("captions", "images"), ("embeddings", "input"), ("reconstructions", "images")):
        answer = post(server, f"/v1/{path}", {field: url, "crop": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "crop"
        assert "crop must be one of center, pad, squash" in answer.json()["error"]["message"]


def test_one_result_an_image_is_no_tiles(server, url):
    answer = post(server, "/v1/embeddings", {"input": url, "crop": "tiles"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "crop"


def test_every_square_counts(server, url):
    """This server takes six at once: two images of three squares, and not three."""
    answer = post(server, "/v1/captions", {"images": [url] * 3, "crop": "tiles"})
    assert answer.status_code == 400 and "at most 6 here" in answer.json()["error"]["message"]
    assert len(post(server, "/v1/captions", {"images": [url] * 2, "crop": "tiles"}).json()["captions"]) == 2
    assert server.routes.admission.active == 0
