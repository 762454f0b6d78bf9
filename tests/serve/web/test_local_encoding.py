"""The server's page with `--web`: photos are encoded in a real browser, and the server gets embeddings alone."""

from __future__ import annotations

import json
import shutil

import httpx
import pytest
import torch
from safetensors.torch import load, save

from serve.engines.transformers import TransformersEngine
from serve.http.auth import Keys
from serve.http.web.browser import BrowserEncoder
from tests.serve.serving import Running
from tests.serve.web.conftest import BUNDLED, SCENES
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import Misuse

TINY = Checkpoint.open(BUNDLED)
DONE = "cards.length === {} && cards.every(card => card.record || card.failed)"
LOADED = "encoder.then(opened => opened.loaded)"


@pytest.fixture(scope="module")
def server(bundle):
    running = Running(TINY, TransformersEngine, web=bundle / "web")
    yield running
    running.stop()


def keep_photos(browser, server) -> None:
    browser.problems.clear()
    browser.requests.clear()
    server.recorded.bodies.clear()
    browser.open(server.url)
    browser.wait("model !== null && !at('keep').hidden")
    browser.run("at('local').click()")


def encodes_with(browser, name: str) -> None:
    browser.wait("at('encoder').textContent.includes('photos stay in this browser')", 180)
    assert browser.run("at('encoder').textContent").endswith(f"with {name}") and browser.run("at('loaded').hidden")


def captions(browser) -> dict[str, str]:
    return dict(browser.run("cards.map(card => [card.name, card.record?.caption ?? card.failed])"))


def test_photos_stay_in_the_browser(browser, server, scenes):
    """32 scenes: the captions that the server writes for the image files; no request carries bytes of an image."""
    keep_photos(browser, server)
    encodes_with(browser, "WebAssembly")
    assert browser.run(LOADED) > 14_000_000  # nothing is in the cache yet
    browser.upload("#files", scenes)
    browser.wait(DONE.format(SCENES), 120)
    bodies = list(server.recorded.bodies)
    posted = [url for url in browser.requests if url == f"{server.url}/v1/generate"]
    assert len(posted) == len(bodies) == SCENES
    for body in bodies:
        tensors = load(body)
        assert tensors.keys() == {"embeds"} and tensors["embeds"].dtype == torch.bfloat16
        assert tensors["embeds"].shape == (TINY.config.queries, TINY.config.llm_width)
        assert len(body) < 2 * TINY.config.queries * TINY.config.llm_width + 200
    files = [("file", (file.name, file.read_bytes(), "image/png")) for file in scenes]
    answer = httpx.post(f"{server.url}/v1/captions", files=files, timeout=60).json()
    assert captions(browser) == {result["filename"]: result["caption"] for result in answer["captions"]}
    assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {server.url[7:]}
    assert browser.problems == []
    assert browser.run("cards[0].record.tokens") > 10 and not browser.run("cards[0].node.querySelector('.mix')")


def test_a_second_visit_loads_from_the_cache(browser, server):
    keep_photos(browser, server)
    encodes_with(browser, "WebAssembly")
    keep_photos(browser, server)
    encodes_with(browser, "WebAssembly")
    assert browser.run(LOADED) == 0
    assert not [url for url in browser.requests if "encoder.onnx" in url or ".wasm?" in url]


def test_progress_while_it_loads(browser, server):
    keep_photos(browser, server)
    encodes_with(browser, "WebAssembly")
    browser.run("caches.delete('vlv')")
    browser.open(server.url)
    browser.wait("model !== null && !at('keep').hidden")
    script = """(() => {
        window.told = [];
        new MutationObserver(() => told.push([at('encoder').textContent, at('loaded').value, at('loaded').hidden]))
            .observe(at('encoder'), { childList: true });
        at('local').click();
    })()"""
    browser.run(script)
    encodes_with(browser, "WebAssembly")
    told = [line for line in browser.run("told") if " MB" in line[0]]
    assert len(told) > 5 and [line[1] for line in told] == sorted(line[1] for line in told) and told[-1][1] == 1
    assert all(not hidden for _, _, hidden in told)
    total = sum(entry["bytes"] for entry in json.loads((server.web / "web.json").read_text())["files"].values())
    gpu = (server.web / "ort" / "ort-wasm-simd-threaded.asyncify.wasm").stat().st_size
    assert told[-1][0].endswith(f" of {(total - gpu) / 1e6:.1f} MB")


def test_webgpu_where_there_is_one(gpu_browser, server, scenes):
    keep_photos(gpu_browser, server)
    encodes_with(gpu_browser, "WebGPU")
    gpu_browser.upload("#files", scenes[:3])
    gpu_browser.wait(DONE.format(3), 60)
    files = [("file", (file.name, file.read_bytes(), "image/png")) for file in scenes[:3]]
    answer = httpx.post(f"{server.url}/v1/captions", files=files, timeout=60).json()
    assert captions(gpu_browser) == {result["filename"]: result["caption"] for result in answer["captions"]}
    assert gpu_browser.problems == []


@pytest.mark.parametrize(
    "script, sentence",
    [
        ("WebAssembly.validate = () => false", "This browser has no WebAssembly SIMD"),
        # what browsers say if a page's memory cannot grow
        (
            "Uint8Array = class extends Uint8Array { constructor(...given) { if (given[0] > 1e6) "
            "throw new RangeError('Array buffer allocation failed'); super(...given); } }",
            "There is too little memory for the encoder",
        ),
    ],
)
def test_a_browser_that_cannot_encode(browser, server, scenes, script, sentence):
    """It says why, and the photo is not sent instead."""
    browser.open(server.url)
    browser.run("caches.delete('vlv')")
    key = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    try:
        keep_photos(browser, server)
        browser.wait(f"at('encoder').textContent.startsWith({sentence!r})")
        browser.upload("#files", scenes[:1])
        browser.wait(DONE.format(1))
        assert browser.run("cards[0].failed").startswith(sentence) and browser.run("at('encoder').className") == "bad"
        assert server.recorded.bodies == [] and browser.run("at('local').checked")
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=key)


def test_a_server_with_keys(browser, bundle, scenes, tmp_path):
    """The weights need the key as captions do; the scripts do not."""
    key = Keys.add(tmp_path / "keys.json", "page", per_minute=60, concurrent=8)
    running = Running(TINY, TransformersEngine, keys=Keys.load(tmp_path / "keys.json"), web=bundle / "web")
    try:
        url = f"{running.url}/browser/"
        assert httpx.get(url + "encoder.js").headers["content-type"].startswith("text/javascript")
        for name in ("web.json", "encoder.onnx", "tokenizer.json"):
            assert httpx.get(url + name).status_code == 401
            found = httpx.get(url + name, headers={"Authorization": f"Bearer {key}"})
            assert found.content == (bundle / "web" / name).read_bytes()
        for name in ("../bundle.json", "%2e%2e/bundle.json", "index.html", "ort"):
            assert httpx.get(url + name, headers={"Authorization": f"Bearer {key}"}).status_code == 404
        browser.open(running.url)
        browser.wait("!at('lock').hidden")
        browser.run(f"at('key').value = '{key}', at('key').onchange()")
        browser.wait("model !== null && !at('keep').hidden")
        browser.run("at('local').click()")
        browser.upload("#files", scenes[:1])
        browser.wait(DONE.format(1), 60)
        assert browser.run("cards[0].record.caption")
    finally:
        running.stop()


def test_embeddings_of_other_programs(server):
    """/v1/generate without the page, in a stream and at once; wrong ones are refused."""
    embeds = torch.randn(TINY.config.queries, TINY.config.llm_width, generator=torch.Generator().manual_seed(0))
    url, body = f"{server.url}/v1/generate", save({"embeds": embeds})
    (choice,) = httpx.post(url, content=body, headers={"X-VLV-Sampling": '{"max_tokens": 9}'}).json()["choices"]
    assert 0 < len(choice["token_ids"]) <= 9 and choice["finish_reason"] in ("stop", "length")
    answer = httpx.post(url, content=body, headers={"X-VLV-Sampling": '{"max_tokens": 9, "stream": true}'})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == choice["token_ids"]
    for wrong in (embeds[:1], embeds * torch.inf):
        refused = httpx.post(url, content=save({"embeds": wrong.contiguous()}))
        assert refused.status_code == 400 and "embeddings" in refused.json()["error"]["message"]
    assert "llm" in httpx.get(f"{server.url}/metrics").text


def test_another_folder_is_refused(bundle, tmp_path):
    """No bundle, one that is not complete, and one of another checkpoint."""
    with pytest.raises(Misuse, match=r"expected the folder web/ of an edge bundle.*export\.edge"):
        BrowserEncoder(tmp_path, TINY)
    copied = shutil.copytree(bundle / "web", tmp_path / "web")
    (copied / "encoder.onnx").write_bytes(b"short")
    with pytest.raises(Misuse, match=r"encoder\.onnx is missing or not complete"):
        BrowserEncoder(copied, TINY)
    about = json.loads((bundle / "web" / "web.json").read_text())
    shutil.copy(bundle / "web" / "encoder.onnx", copied)
    (copied / "web.json").write_text(json.dumps(about | {"source": "0" * 64}))
    with pytest.raises(Misuse, match="another checkpoint's encoder"):
        BrowserEncoder(copied, TINY)


def test_a_server_without_the_encoder(captioning_checkpoint):
    """Nothing is offered, and the answer says how."""
    from tests.serve.serving import Scripted

    running = Running(Checkpoint.open(captioning_checkpoint), Scripted)
    try:
        answer = httpx.get(f"{running.url}/browser/web.json")
        assert answer.status_code == 404 and "--web" in answer.json()["error"]["message"]
        assert not httpx.get(f"{running.url}/v1/models").json()["data"][0]["encodes"]
        assert "'self' 'wasm" not in httpx.get(running.url).headers["Content-Security-Policy"]
    finally:
        running.stop()
