"""The page of an edge bundle in a real browser: it encodes there, and a gateway gets embeddings and nothing else."""

from __future__ import annotations

import asyncio
import base64
import functools
import http.server
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import load

from export import edge
from export.edge_bundle.web_page import INSTALL, ORT_WEB
from serve.engines.base import LLMSpec, Options
from serve.engines.transformers import TransformersEngine
from serve.http.admission import Admission
from serve.http.app import Bounds
from serve.http.auth import Keys
from serve.http.gateway import Gateway, Upstream
from serve.http.metrics import Metrics
from tests.serve.serving import Recorded
from tests.serve.web.conftest import BUNDLED, SCENES, needs_packages
from vlv.checkpoints.folder import Checkpoint

DONE = f"captions.cards.length === {SCENES} && captions.cards.every(card => card.caption || card.failed)"


@pytest.fixture(scope="module")
def site(bundle):
    """The folder web/ behind Python's own web server; the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, text, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=bundle / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def gateway(site):
    """A gateway in front of transformers in float32, which the page's origin may call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, recorded = None, None

    async def serve():
        nonlocal server, recorded
        engine = TransformersEngine(LLMSpec.of(Checkpoint.open(BUNDLED)), 300, 8, False, Options())
        upstream = Upstream(engine, Metrics())
        app = Gateway(upstream, Keys(), Admission(64), Bounds())
        app.cors = (site[0],)
        recorded = Recorded(app.app())
        server = uvicorn.Server(uvicorn.Config(recorded, port=port, log_level="error"))
        await server.serve()
        await upstream.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            if httpx.get(url + "/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the gateway does not get ready"
        time.sleep(0.1)
    yield url, recorded
    server.should_exit = True
    thread.join(20)


def ready(browser, site, gateway) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(f"{site[0]}/?gateway={gateway[0]}")
    browser.wait("document.getElementById('status').textContent === 'Ready.'", 180)


def test_captions_without_the_photos(browser, site, gateway, scenes, checkpoint_captions):
    """32 scenes: the captions of the float32 reference; what leaves the page is embeddings in bfloat16."""
    ready(browser, site, gateway)
    assert browser.run("captions.encoder.loaded") > 14_000_000  # nothing is in the cache yet
    browser.upload("#files", scenes)
    browser.wait(DONE, 120)
    found = browser.run("captions.cards.map(card => [card.name, card.caption])")
    assert dict(found) == checkpoint_captions
    assert browser.problems == []
    origins = {url.split("/")[2] for url in browser.requests if url.startswith("http")}
    assert origins == {site[0][7:], gateway[0][7:]}, "the network log"
    posted = [url for url in browser.requests if url.startswith(gateway[0])]
    assert set(posted) == {f"{gateway[0]}/v1/generate"} and len(gateway[1].bodies) == SCENES
    config = Checkpoint.open(BUNDLED).config
    for body in gateway[1].bodies:
        tensors = load(body)
        assert tensors.keys() == {"embeds"} and tensors["embeds"].dtype == torch.bfloat16
        assert tensors["embeds"].shape == (config.queries, config.llm_width)
        assert len(body) < 2 * config.queries * config.llm_width + 200


def test_a_second_visit_loads_from_the_cache(browser, site, gateway):
    ready(browser, site, gateway)
    site[1].clear()
    ready(browser, site, gateway)
    assert browser.run("captions.encoder.loaded") == 0
    assert not [path for path in site[1] if "encoder.onnx" in path or path.endswith(".wasm")]


def test_embeddings_are_those_of_python(browser, site, gateway, bundle):
    """A photo that is turned, landscape, with transparency: the page sees the same pixels."""
    from export.edge_bundle.caption import read_image

    ready(browser, site, gateway)
    file = bundle / "vectors" / "turned" / "image.png"
    content = base64.b64encode(file.read_bytes()).decode()
    script = f"""(async () => {{
        const bytes = Uint8Array.from(atob('{content}'), c => c.charCodeAt(0));
        const tensor = await captions.encoder.pixels(new Blob([bytes], {{ type: 'image/png' }}));
        const {{ crop }} = await captions.encoder.cropping.run({{ image: tensor }});
        const embeddings = await captions.encoder.run(tensor);
        return [[...tensor.dims], [...tensor.data], [...crop.data], [...embeddings.data]];
    }})()"""
    shape, data, crop, embeddings = browser.run(script)
    expected = read_image(file)
    assert tuple(shape) == expected.shape and (np.array(data, np.uint8).reshape(shape) == expected).all()
    recorded = np.asarray(Image.open(file.parent / "crop.ppm")).transpose(2, 0, 1).ravel()
    assert abs(np.array(crop) - recorded).max() <= 1
    values = np.fromfile(file.parent / "embeddings.f32", "<f4")
    assert abs(np.array(embeddings) - values).max() < 1e-4 * abs(values).max()


def test_webgpu_where_there_is_one(gpu_browser, site, gateway, scenes, checkpoint_captions):
    """Its embeddings are compared with the recorded ones before it is used."""
    ready(gpu_browser, site, gateway)
    assert gpu_browser.run("captions.encoder.provider") == "webgpu"
    gpu_browser.upload("#files", scenes[:4])
    gpu_browser.wait("captions.cards.length === 4 && captions.cards.every(card => card.caption || card.failed)", 60)
    found = dict(gpu_browser.run("captions.cards.map(card => [card.name, card.caption])"))
    assert found == {file.name: checkpoint_captions[file.name] for file in scenes[:4]}
    assert gpu_browser.problems == []


@pytest.mark.parametrize(
    "script",
    [
        "GPU.prototype.requestAdapter = async () => null",
        "fetch = (load => async (url, more) => `${url}`.includes('check.f32') ? new Response(new Uint8Array(16384))"
        " : load(url, more))(fetch)",
    ],
)
def test_webassembly_where_webgpu_fails(gpu_browser, site, gateway, scenes, checkpoint_captions, script):
    """There is no adapter, or its embeddings are not the recorded ones (which are all zero here)."""
    gpu_browser.open(site[0])
    gpu_browser.run("caches.delete('vlv')")
    key = gpu_browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    try:
        ready(gpu_browser, site, gateway)
        assert gpu_browser.run("captions.encoder.provider") == "wasm"
        gpu_browser.upload("#files", scenes[:1])
        gpu_browser.wait("captions.cards.length === 1 && captions.cards[0].caption")
        assert gpu_browser.run("captions.cards[0].caption") == checkpoint_captions[scenes[0].name]
    finally:
        gpu_browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=key)


def test_what_goes_wrong_is_said(browser, site, gateway, scenes, tmp_path):
    ready(browser, site, gateway)
    (tmp_path / "no.png").write_bytes(b"no image")
    browser.upload("#files", [tmp_path / "no.png"])
    browser.wait("captions.cards.length === 1 && captions.cards[0].failed")
    assert browser.run("captions.cards[0].failed") == "this browser cannot read the image"
    browser.run("document.getElementById('gateway').value = 'http://127.0.0.1:9'")
    browser.upload("#files", scenes[:1])
    browser.wait("captions.cards.length === 2 && captions.cards[1].failed")
    assert "the gateway http://127.0.0.1:9 does not answer" in browser.run("captions.cards[1].failed")
    browser.problems.clear()


def test_a_browser_without_simd(browser, site, gateway):
    """It says so before it loads anything."""
    ready(browser, site, gateway)
    script = "WebAssembly.validate = () => false"
    key = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    try:
        browser.open(f"{site[0]}/?gateway={gateway[0]}")
        browser.wait("document.getElementById('status').className === 'failed'")
        assert "no WebAssembly SIMD" in browser.run("document.getElementById('status').textContent")
        assert browser.run("document.getElementById('files').disabled")
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=key)


def test_another_library_is_refused(tmp_path, capsys):
    needs_packages()
    out = tmp_path / "out"
    command = ["--ckpt", str(BUNDLED), "--out", str(out), "--web", str(tmp_path)]
    assert edge.main(command) == 2
    assert INSTALL in capsys.readouterr().err
    (tmp_path / "package.json").write_text('{"version": "1.0.0"}')
    assert edge.main(command) == 2
    assert f"is onnxruntime-web 1.0.0, expected {ORT_WEB}" in capsys.readouterr().err
    assert not out.exists()
