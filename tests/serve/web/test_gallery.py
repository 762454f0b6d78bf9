"""The page of --gallery with 10,000 images, in a real browser: pages, filters, keys, and edits that become captions."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.core.inputs import Item, expand
from serve.outputs.factory import sink_class
from serve.outputs.jsonl import SinkError, captions_of, read_patch
from serve.reports import gallery
from vlv.checkpoints.folder import Checkpoint

COUNT = 10_000
SECONDS = 3.0  # for a page or filter of 10,000 images, on a busy machine


@pytest.fixture(scope="module")
def folder(random_checkpoint, tmp_path_factory) -> Path:
    """A gallery of 10,000 records, all of one small image file by other names."""
    top = tmp_path_factory.mktemp("gallery")
    (top / "in").mkdir()
    first = top / "in" / "00000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(first)
    with open(top / "captions.jsonl", "w") as file:
        for i in range(COUNT):
            path = top / "in" / f"{i:05}.png"
            if i:
                path.hardlink_to(first)
            text = f"The image shows thing number {i} before a wall of some color."
            text = {5: "Short.", 6: "Twice the same, in some words.", 7: "Twice the same, in some words."}.get(i, text)
            text = "on a red wall " * 5 if i == 8 else "<b>Bold</b> is no markup here, it is text." if i == 9 else text
            finish = "length" if i in (8, 500) else "stop"
            file.write(
                json.dumps({"id": str(path), "path": str(path), "caption": text, "finish_reason": finish}) + "\n"
            )
    gallery.write(top / "g.html", Checkpoint.open(random_checkpoint), expand([str(top / "in")]), top / "captions.jsonl")
    return top


@pytest.fixture
def page(browser, folder):
    browser.problems.clear()
    browser.requests.clear()
    browser.open((folder / "g.html").as_uri())
    yield browser
    browser.run("edits.clear()")
    assert browser.problems == [] and not [url for url in browser.requests if url.startswith("http")]


def names(page) -> list[str]:
    return [
        name.rpartition("/")[2] for name in page.run("[...document.querySelectorAll('small')].map(s => s.innerText)")
    ]


def choose(page, name: str) -> list[str]:
    page.run(f"at('filter').value = '{name}', at('filter').dispatchEvent(new Event('change')), null")
    return names(page)


def edit(page, number: int, text: str) -> None:
    page.run(
        f"(() => {{ const area = document.querySelectorAll('textarea')[{number}]; area.focus(); "
        f"area.value = {json.dumps(text)}; area.dispatchEvent(new Event('input')); }})()"
    )


def test_ten_thousand_images_are_paged_and_load_lazily(page, folder):
    assert names(page) == [f"{i:05}.png" for i in range(48)]
    assert page.run("at('place').textContent") == "1–48 of 10000"
    page.press("ArrowRight")
    assert names(page)[0] == "00048.png"
    page.wait("document.querySelector('img').naturalWidth === 192")
    loaded = [url for url in page.requests if url.endswith(".jpg")]
    assert loaded and len(set(loaded)) <= 48  # only those of this page
    assert page.run("[...document.images].every(image => image.loading === 'lazy')")
    start = time.monotonic()
    page.run("show(200), document.body.getBoundingClientRect().height")
    assert names(page)[0] == "09600.png" and time.monotonic() - start < SECONDS
    assert len(page.run("[...document.querySelectorAll('article')].map(a => 1)")) == 48
    assert page.run("show(1e9), at('next').disabled") and names(page)[-1] == "09999.png"


def test_filters_and_search(page):
    start = time.monotonic()
    assert choose(page, "short") == ["00005.png"]
    assert choose(page, "repeated") == ["00006.png", "00007.png", "00008.png"]
    assert choose(page, "cut") == ["00008.png", "00500.png"]
    assert time.monotonic() - start < 4 * SECONDS
    assert choose(page, "edited") == [] and page.run("at('place').textContent") == "none"
    choose(page, "all")
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.run("at('search').value = 'number 4321', at('search').dispatchEvent(new Event('input')), null")
    assert names(page) == ["04321.png"]
    page.press("Escape")
    page.run("at('search').value = '', choose()")
    assert page.run("[...document.querySelectorAll('textarea')][9].value").startswith("<b>Bold</b>")
    assert page.run("document.querySelectorAll('main b').length") == 0


def test_edits_become_captions(page, folder, tmp_path):
    edit(page, 3, "A thing, as I see it.")
    page.press("ArrowRight")  # moves in the text, not to another page
    assert names(page)[0] == "00000.png"
    page.press("Escape")
    page.press("ArrowRight")
    edit(page, 0, "Another.")
    page.press("Escape")
    assert choose(page, "edited") == ["00003.png", "00048.png"]
    assert page.run("at('save').textContent") == "save patch (2)"
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.run("at('save').click()")
    patch, deadline = tmp_path / "g.patch.jsonl", time.monotonic() + 30
    while not patch.exists() or not patch.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    edits = read_patch(patch)
    assert {Path(name).name: edit["caption"] for name, edit in edits.items()} == {
        "00003.png": "A thing, as I see it.", "00048.png": "Another.",
    }  # fmt: skip
    output = tmp_path / "captions.jsonl"
    output.write_bytes((folder / "captions.jsonl").read_bytes())
    sink = sink_class("jsonl")(output, "m")
    assert sink.patch(edits) == 2 and sink.patch(edits) == 0
    sink.close()
    changed = [record for record in map(json.loads, output.open()) if record.get("edited")]
    assert [record["caption"] for record in changed] == ["A thing, as I see it.", "Another."]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "coco", "imagefolder", "kohya"])
def test_a_patch_in_every_format_that_has_a_gallery(kind, tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    output = tmp_path / {"coco": "c.json", "kohya": "c.json", "imagefolder": "metadata.jsonl"}.get(kind, "c.jsonl")
    sink = sink_class(kind)(output, "m")
    record = {"id": str(image), "path": str(image), "caption": "Old.", "captions": ["Old.", "Second."], "model": "m"}
    sink.caption(record, Item(str(image), str(image)))
    sink.close()
    patch = tmp_path / "p.jsonl"
    patch.write_text(json.dumps({"id": str(image), "before": "Old.", "caption": "New."}) + "\n")
    sink = sink_class(kind)(output, "m")
    assert sink.patch(read_patch(patch)) == 1
    assert [captions_of(record) for record in sink._journal.records()] == [["New.", "Second."]]
    assert sink.patch({str(image): {"before": "Old.", "caption": "Other."}}) == 0
    sink.close()
    written = image.with_suffix(".txt") if kind == "txt" else output
    assert "New." in written.read_text() and "Old." not in written.read_text()


def test_what_is_no_patch(tmp_path):
    for content, words in {'{"id": "a"}\n': "is not a patch of a gallery page", "[]\n": "is not a patch"}.items():
        (tmp_path / "p").write_text(content)
        with pytest.raises(SinkError, match=words):
            read_patch(tmp_path / "p")
    with pytest.raises(SinkError, match="no such file"):
        read_patch(tmp_path / "absent")
