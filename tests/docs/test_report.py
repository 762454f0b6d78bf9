"""The page of all figures shows what the JSON files hold, says what is missing, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from benchmarks import report


@pytest.fixture(scope="module")
def page():
    return report.page()


def test_it_shows_the_committed_figures(page):
    caption = json.loads((report.FOLDER / "caption.json").read_text())
    encoder = json.loads((report.FOLDER / "encoder_cpu.json").read_text())["runs"][0]
    assert f"{caption['parts']['road']['images_per_second']:.4g} /s" in page
    assert f"{encoder['error']['ours_to_theirs']['max']:.1e} at most" in page
    assert f"{60 / encoder['seconds']['ours']['median']:.4g} /min" in page
    for file in (report.FOLDER / "training").glob("*.json"):
        assert f"{file.stem}: loss over steps" in page
    assert "simulated, not measured" in page


def test_it_is_whole_and_needs_nothing_else(page):
    class Balanced(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag in ("svg", "figure", "table", "h1", "h2", "p", "style"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag in self.open:
                while self.open.pop() != tag:
                    raise AssertionError(f"{tag} closes what is not open")

    parser = Balanced()
    parser.feed(page)
    assert not [tag for tag in parser.open if tag != "p"]
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\(|<script', page)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()  # a picture may spell it


def test_a_section_without_figures_says_how_they_are_made(page):
    assert "Not measured yet: <code>python -m serve.bench" in page
    assert "Not measured yet: <code>python -m export.onnx" in page


def test_load_trace_and_drift_are_added(tmp_path):
    point = {"offered_per_second": 2, "answered_per_second": 1.9, "e2e": {"p50": 0.5}}
    (tmp_path / "load.json").write_text(json.dumps({"sweep": [point, {**point, "offered_per_second": 4}]}))
    events = [
        {"ph": "X", "name": "a", "cat": "the <encoder>", "ts": 0, "dur": 10**6},
        {"ph": "M", "name": "thread_name"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps(events))
    checks = {
        "outputs": {"a": {"max": 0.002, "rms": 0.001}, "b": {"max": 0.5, "rms": 0.1}},
        "captions": {"agreement": 0.995},
    }
    entries = {"encoder": {"precision": "fp16", "verification": checks}, "engine": {"precision": "fp16"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"artifacts": entries}))
    page = report.page(tmp_path / "load.json", tmp_path / "trace.json", tmp_path)
    assert "Not measured yet" not in page and "the &lt;encoder&gt;" in page and "1.0 s in all" in page
    assert "<td>encoder<td>fp16<td>5.0e-01<td>1.0e-01<td>99.5%" in page
    assert "Answered a second, over requests offered" in page


def test_the_command(tmp_path, capsys):
    assert report.main(["-o", str(tmp_path / "new" / "report.html")]) == 0
    assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")
    assert report.main(["--trace", "absent.json"]) == 2
    assert capsys.readouterr().err == "error: there is no absent.json\n"
