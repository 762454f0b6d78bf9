"""Test the page at `/` in a real browser: streamed captions, reconstructions, mixtures, errors, keyboard, dark mode."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import threading

import httpx
import pytest

from serve.http.auth import Keys
from serve.http.web.page import HEADERS, PAGE
from tests.serve.serving import CLEAN, Running, Scripted
from vlv.checkpoints.folder import Checkpoint

DONE = "cards.length && cards.every(card => card.record || card.failed)"
RECONSTRUCTED = "[...document.querySelectorAll('.reconstruction img')].filter(i => i.src && !i.className).length"


class LLMEngine(Scripted):
    """Counters of this module's server."""

    max_running = 0

    async def tokens(self, embeds, sampling, every):
        async for ids in super().tokens(embeds, sampling, every):
            type(self).max_running = max(self.max_running, self.running)
            yield ids


@pytest.fixture(scope="module")
def server(t2i_checkpoint):
    running = Running(Checkpoint.open(t2i_checkpoint), LLMEngine)
    yield running
    running.stop()


@pytest.fixture
def page(browser, server):
    """Load the page, with few reconstruction steps; afterwards it must have thrown nothing."""
    browser.problems.clear()
    browser.requests.clear()
    browser.open(server.url)
    browser.wait("model !== null")
    browser.run("at('steps').add(new Option('2', '2', true, true)), at('reconstruct').checked = false")
    yield browser
    assert browser.problems == []
    assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {server.url[7:]}


def test_one_document_without_outside_resources():
    assert not re.search(r"https?://|<script src|<link rel=\"style|@import|url\(", PAGE)
    assert "'unsafe-inline'" not in HEADERS["Content-Security-Policy"]
    assert "/*STYLE*/" not in PAGE and "/*SCRIPT*/" not in PAGE


def test_captions_stream_and_download(page, scene_images):
    LLMEngine.pace = 0.03
    try:
        page.upload("#files", [scene_images / "00.png"])
        page.wait("cards[0].text.textContent.includes('cat.')")
        assert page.run("cards[0].record") is None and page.run("cards[0].node.ariaBusy") == "true"  # it is streaming
    finally:
        LLMEngine.pace = 0.001
    page.wait(DONE)
    assert page.run("cards[0].text.textContent") == CLEAN
    assert page.run("cards[0].image.naturalWidth") > 0
    text = page.run("""(async () => {
        let blob;
        const make = URL.createObjectURL;
        URL.createObjectURL = given => make.call(URL, blob = given);
        HTMLAnchorElement.prototype.click = () => {};
        at("download").onclick();
        URL.createObjectURL = make;
        return blob.text();
    })()""")
    (record,) = map(json.loads, text.splitlines())
    assert record["id"] == "00.png" and record["caption"] == CLEAN and record["model"] == "tiny"
    assert record["tokens"] > 20 and 0 < record["timings"]["first"] < record["timings"]["total"]
    assert float(page.run("at('rate').textContent")) > 0 and page.run("at('total').textContent").endswith(" s")


def test_fifty_files_and_a_broken_one(page, scene_images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    LLMEngine.max_running = 0
    page.upload("#files", [*sorted(scene_images.glob("*.png"))[:49], tmp_path / "broken.png"])
    page.wait(DONE, 60)
    assert page.run("at('done').textContent") == "49 of 50" and page.run("at('failed').textContent") == "1"
    assert page.run(f"cards.filter(card => card.text.textContent === {json.dumps(CLEAN)}).length") == 49
    assert 1 < LLMEngine.max_running <= page.run("MAX_CAPTIONS")
    toast = page.run("document.querySelector('#toasts p').textContent")
    assert "broken.png: the image cannot be used" in toast and "not recognised as an image" in toast
    assert page.run("document.querySelector('#toasts').role") == "alert"
    assert page.run("at('status').textContent") == "49 captioned, 1 failed."
    page.press("Escape")
    assert page.run("document.querySelector('#toasts').children.length") == 0
    page.run("document.querySelector('.failed .again').click()")
    page.wait("document.querySelector('#toasts').children.length === 1")


def test_a_failed_file_says_so_and_can_be_tried_again(page, scene_images, tmp_path):
    file = tmp_path / "late.png"
    file.write_bytes(b"not an image")
    page.upload("#files", [file])
    page.wait(DONE)
    text = page.run("cards[0].text.innerText")
    assert text.startswith("Failed: the image cannot be used") and "not recognised as an image" in text
    assert page.run("cards[0].node.className") == "failed" and page.run("cards[0].node.ariaBusy") is None
    assert page.run("getComputedStyle(cards[0].text).color !== getComputedStyle(document.body).color")
    buttons = "[...cards[0].node.querySelectorAll('button')].filter(b => b.checkVisibility()).map(b => b.innerText)"
    assert page.run(buttons) == ["Try again", "Remove"]
    assert page.run("at('download').disabled") and page.run("at('failed').textContent") == "1"
    page.run("cards[0].again.focus()")
    page.press(" ")  # the file is still not an image
    page.wait("document.querySelector('#toasts').children.length === 2")
    content = base64.b64encode((scene_images / "00.png").read_bytes()).decode()
    page.run(f"""(() => {{
        const bytes = Uint8Array.from(atob('{content}'), c => c.charCodeAt(0));
        cards[0].file = new File([bytes], 'late.png');
        cards[0].again.click();
    }})()""")
    page.wait("cards[0].record")
    assert page.run("cards[0].node.className") == "" and page.run("cards[0].text.textContent") == CLEAN
    assert page.run(buttons) == ["Copy", "Remove"] and page.run("at('failed').textContent") == "0"


@pytest.mark.parametrize("secure", [True, False])
def test_copies_a_caption(page, scene_images, secure):
    """With the clipboard of pages over HTTPS or of this machine, and without it, as over plain HTTP."""
    page.upload("#files", [scene_images / "00.png"])
    page.wait("cards.length && !cards[0].copy.hidden && cards[0].record")
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # the clipboard is that of the page in front
    page.run("navigator.clipboard.writeText('before')")
    if not secure:
        page.run(
            "clipboard = navigator.clipboard; Object.defineProperty(navigator, 'clipboard', {get: () => undefined})"
        )
    page.run("cards[0].copy.focus()")
    page.press(" ")
    page.wait("cards[0].copy.textContent === 'Copied'")
    assert page.run("cards[0].copy.ariaLabel") == "Copied the caption of 00.png"
    assert page.run("(globalThis.clipboard ?? navigator.clipboard).readText()") == CLEAN
    page.wait("cards[0].copy.textContent === 'Copy'")
    assert page.run("String(getSelection())") == ""


def test_a_narrow_screen(page, scene_images, tmp_path):
    """360 pixels, as on small phones: nothing is cut off, and everything can be touched."""
    long = tmp_path / ("a-very-long-name-without-a-space-" * 5 + ".png")
    long.write_bytes((scene_images / "00.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        page.upload("#files", [long, scene_images / "01.png", tmp_path / "broken.png"])
        page.wait(DONE)
        page.run("[...document.querySelectorAll('.mix')].slice(0, 2).forEach(box => box.click())")
        page.wait(f"at('mixcaption').textContent === {json.dumps(CLEAN)}")
        outside = """[...document.querySelectorAll('body *')].filter(node => {
            const box = node.getBoundingClientRect();
            return node.checkVisibility() && box.width && (box.left < 0 || box.right > 360);
        }).map(node => node.outerHTML.slice(0, 100))"""
        assert page.run(outside) == []
        assert page.run("innerWidth") == 360 and page.run("document.documentElement.scrollWidth") == 360
        small = """[...document.querySelectorAll('button, select, .drop, form label, article label')].filter(node =>
            node.checkVisibility() && node.getBoundingClientRect().height < 24).map(node => node.outerHTML)"""
        assert page.run(small) == []  # WCAG 2.2, target size
        columns = "new Set([...document.querySelectorAll('article')].map(a => a.getBoundingClientRect().left)).size"
        assert page.run(columns) == 1
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


class Prefix:
    """A proxy of its own, as nginx with a location: requests below a path go to a server, without the path."""

    def __init__(self, path: str, port: int):
        self._path, self._upstream, self.asked = path, port, []
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._handle, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()

    async def _handle(self, reader, writer) -> None:
        method, path, rest = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
        self.asked.append(path)
        if path != self._path and not path.startswith(f"{self._path}/"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return writer.close()
        rest = re.sub(r"(?im)^connection: .*\r\n", "", rest).replace("\r\n", "\r\nConnection: close\r\n", 1)
        upstream, answer = await asyncio.open_connection("127.0.0.1", self._upstream)
        answer.write(f"{method} {path.removeprefix(self._path) or '/'} {rest}".encode())
        await asyncio.gather(self._pump(reader, answer, False), self._pump(upstream, writer, True))

    @staticmethod
    async def _pump(reader, writer, close: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                writer.write(chunk)
                await writer.drain()
        if close:
            writer.close()


@pytest.mark.parametrize("ending", ["/", ""])
def test_below_a_path_of_a_proxy(browser, server, scene_images, ending):
    proxy = Prefix("/apps/vlv", int(server.url.rpartition(":")[2]))
    try:
        browser.problems.clear()
        browser.open(f"http://127.0.0.1:{proxy.port}/apps/vlv{ending}")
        browser.wait("model !== null")
        browser.run("at('reconstruct').checked = false")
        browser.upload("#files", [scene_images / "00.png"])
        browser.wait(DONE)
        assert browser.run("cards[0].record.caption") == CLEAN and browser.problems == []
        assert {path for path in proxy.asked if not path.startswith("/apps/vlv")} <= {"/favicon.ico"}
        assert "/apps/vlv/v1/chat/completions" in proxy.asked
    finally:
        browser.open("about:blank")
        proxy.stop()


def test_reconstruction_follows_the_guidance(page, scene_images):
    page.run("at('reconstruct').checked = true")
    page.upload("#files", [scene_images / "00.png"])
    page.wait(f"{RECONSTRUCTED} === 1")
    first = page.run("document.querySelector('.reconstruction img').src")
    page.run("at('guidance').focus()")
    page.press("ArrowRight")
    assert page.run("at('strength').textContent") == "2.5"
    page.wait(f"{RECONSTRUCTED} === 1 && document.querySelector('.reconstruction img').src !== {json.dumps(first)}")
    page.run("at('reconstruct').click()")
    assert page.run("document.querySelector('.reconstruction').hidden")


def test_mixing_two(page, scene_images):
    page.upload("#files", [scene_images / f"{i:02}.png" for i in range(3)])
    page.wait(DONE)
    page.run("document.querySelectorAll('.mix').forEach(box => box.click())")
    assert page.run("chosen.map(card => card.name)") == ["01.png", "02.png"]  # the first has given way
    page.wait(f"at('mixcaption').textContent === {json.dumps(CLEAN)}")
    assert page.run("at('mixto').alt") == "02.png"
    half = page.run("at('mixed').src")
    page.run("at('share').focus()")
    page.press("ArrowRight")
    page.wait(f"at('mixed').className === '' && at('mixed').src !== {json.dumps(half)}")
    page.run("cards[2].node.querySelector('.remove').click()")
    assert page.run("at('mixing').hidden") and page.run("document.activeElement.ariaLabel") == "Remove 01.png"


def test_keyboard_names_and_dark_mode(page, scene_images):
    page.upload("#files", [scene_images / "00.png"])
    page.wait(DONE)
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id || document.activeElement.className"))
    order = ["files", "reconstruct", "guidance", "steps", "download", "clear", "mix", "remove"]
    assert [name for name in reached if name in order][: len(order)] == order
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "checkbox", "slider", "combobox", "image", "textbox"}
    for node in tree:
        if not node["ignored"] and node["role"]["value"] in controls:
            assert node["name"]["value"], node
    shades = []
    for scheme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector in ("body", "#status", "footer small", "button"):
            shades.append(contrast(page.run(COLOURS % selector)))
    assert min(shades) >= 4.5, shades  # WCAG AA
    page.call("Emulation.setEmulatedMedia", features=[])


COLOURS = """(() => {
    let node = document.querySelector('%s'), ink = getComputedStyle(node).color, ground = 'rgba(0, 0, 0, 0)';
    for (; ground === 'rgba(0, 0, 0, 0)'; node = node.parentElement) ground = getComputedStyle(node).backgroundColor;
    return [ink, ground];
})()"""


def contrast(colours: list[str]) -> float:
    """WCAG's contrast ratio of two `rgb(...)` colours."""

    def luminance(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_name_or_caption_is_never_markup(page, scene_images, tmp_path):
    name = "<img src=x onerror=boom()>.png"
    (tmp_path / name).write_bytes((scene_images / "00.png").read_bytes())
    page.upload("#files", [tmp_path / name])
    page.wait(DONE)
    assert page.run("document.querySelector('footer small').textContent").startswith(name)
    assert page.run("document.querySelectorAll('article img').length") == 2


def test_asks_for_a_key_and_waits_where_the_server_is_full(browser, t2i_checkpoint, scene_images, tmp_path):
    key = Keys.add(tmp_path / "keys.json", "me", concurrent=1)
    guarded = Running(Checkpoint.open(t2i_checkpoint), LLMEngine, keys=Keys.load(tmp_path / "keys.json"))
    try:
        browser.open(guarded.url)
        browser.wait("!at('lock').hidden")
        assert browser.run("at('status').textContent") == "This server asks for an API key."
        browser.run(f"at('key').value = {json.dumps(key)}, at('key').onchange()")
        browser.wait("model !== null")
        browser.run("at('reconstruct').checked = false")
        browser.upload("#files", [scene_images / f"{i:02}.png" for i in range(3)])
        browser.wait(DONE)  # one image at a time: the others are refused with 429 and come again
        assert browser.run("at('done').textContent") == "3 of 3"
    finally:
        guarded.stop()


def reconstruct(server, **body):
    return httpx.post(server.url + "/v1/reconstructions", json=body, timeout=60)


def test_the_route_reconstructs_like_the_library(server, scene_images):
    import io

    import numpy as np
    import torch
    from PIL import Image

    from vlv.data.image import load_crop
    from vlv.diffusion.t2i import T2I

    checkpoint = server.service.checkpoint
    files = [scene_images / "00.png", scene_images / "01.png"]
    urls = ["data:image/png;base64," + base64.b64encode(f.read_bytes()).decode() for f in files]
    answers = [reconstruct(server, images=urls[:1], steps=3), reconstruct(server, images=urls, steps=3, share=0.25)]
    answers.append(reconstruct(server, images=urls, steps=3, share=0.25, mix="splice"))
    assert [a.status_code for a in answers] == [200] * 3
    crops = torch.from_numpy(np.stack([load_crop(f, checkpoint.config.image_size) for f in files]))
    with torch.inference_mode():
        first, second = checkpoint.load_encoder().context(crops)
        cut = 3 * len(first) // 4
        contexts = torch.stack([first, 0.75 * first + 0.25 * second, torch.cat([first[:cut], second[cut:]])])
        expected = T2I.load(checkpoint.t2i).reconstruct(contexts, steps=3)
    for answer, image in zip(answers, expected, strict=True):
        png = base64.b64decode(answer.json()["image"].split(",")[1])
        decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).permute(2, 0, 1)
        # another batch adds in another order: a value at the edge of two steps of 1/255 may fall to either
        assert (decoded.int() - image.int()).abs().max() <= 1
    assert "caption" not in answers[0].json() and answers[1].json()["caption"] == CLEAN


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"images": []}, "images must be one image URL"),
        ({"images": ["data:,x"] * 3}, "3 images in one request; this server takes up to 2"),
        ({"guidance": 0}, "guidance must be a number from 1 to 20, not 0"),
        ({"steps": 2.5}, "steps must be an integer from 1 to 100, not 2.5"),
        ({"share": float("nan")}, "share must be a number from 0 to 1, not nan"),
        ({"mix": "stir"}, "mix must be blend or splice, not 'stir'"),
        ({"sampler": "x"}, "sampler is not supported here: a reconstruction takes steps, guidance"),
        ({"images": "data:,not an image"}, "not recognised as an image"),
    ],
)
def test_refused_in_one_sentence(server, body, words):
    content = json.dumps({"images": "data:,x", **body})
    answer = httpx.post(server.url + "/v1/reconstructions", content=content)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_a_checkpoint_without_a_text_to_image_model(random_checkpoint, scene_images):
    import numpy as np

    from serve.http.errors import ApiError
    from serve.http.reconstructor import ReconstructionParams, ReconstructionService

    service = ReconstructionService(Checkpoint.open(random_checkpoint))
    with pytest.raises(ApiError, match="no text-to-image model") as refused:
        asyncio.run(service.reconstruct([np.zeros((3, 64, 64), np.uint8)], ReconstructionParams()))
    assert refused.value.status == 501


def test_reconstructions_are_counted(server):
    text = httpx.get(server.url + "/metrics").text
    assert 'vlv_stage_seconds_count{stage="reconstruct"}' in text


def test_a_reconstructor_that_is_busy_or_has_no_memory(t2i_checkpoint, monkeypatch):
    import torch

    from serve.http.errors import ApiError
    from serve.http.reconstructor import MAX_WAITING, ReconstructionParams, ReconstructionService

    service, go = ReconstructionService(Checkpoint.open(t2i_checkpoint)), threading.Event()

    def full(checkpoint):
        go.wait(20)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vlv.diffusion.reconstruction.TorchReconstructor.of", full)

    async def ask():
        first = [asyncio.create_task(service.reconstruct([], ReconstructionParams())) for _ in range(MAX_WAITING + 1)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="reconstructions are waiting already") as refused:
            await service.reconstruct([], ReconstructionParams())
        assert refused.value.status == 503 and refused.value.retry_after
        go.set()
        return await asyncio.gather(*first, return_exceptions=True)

    answers = asyncio.run(ask())
    assert {(type(a), a.status, a.code) for a in answers} == {(ApiError, 503, "no_memory")}
