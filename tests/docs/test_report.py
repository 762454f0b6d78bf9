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
    assert f"{caption['parts']['service']['images_per_second']:.4g} /s" in page
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


def test_a_section_without_figures_says_how_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    page = report.page()
    assert page.count("Not measured yet") == 9
    for module in ("roofline", "measure", "encoder_cpu", "export_cpu", "scale"):
        assert f"Not measured yet: <code>python -m benchmarks.{module}" in page


def test_what_was_measured_here_takes_the_place_of_the_committed(tmp_path):
    quantiles = {"p50": 0.5, "p90": 0.6, "p99": None}
    measures = dict.fromkeys(("ttft", "tpot", "itl", "e2e"), quantiles)
    point = {"offered_per_second": 2, "answered_per_second": 1.9, "goodput_per_second": 1.5, **measures}
    about = {"model": "a <model>", "seconds": 3, "max_tokens": 20, "slo": {"ttft": 1, "e2e": 2}}
    (tmp_path / "load.json").write_text(json.dumps({**about, "sweep": [point, {**point, "offered_per_second": 4}]}))
    events = [
        {"ph": "X", "name": "a", "cat": "the <encoder>", "ts": 0, "dur": 10**6},
        {"ph": "M", "name": "thread_name"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps(events))
    times = {"p50_ms": 10.0, "p90_ms": 11.0, "p99_ms": 12.5, "images_per_s": 100.0, "peak_bytes": 2 * 10**9}
    run = {"runtime": "onnx", "batch": 1, "precision": "fp32", "error": {"rms": 1e-6}, "wrong": False, **times}
    wrong = {**{k: run[k] for k in ("runtime", "precision", "error", "peak_bytes")}, "batch": 8, "wrong": True}
    (tmp_path / "bench.json").write_text(json.dumps({"runs": [run, wrong]}))
    checks = {
        "outputs": {"a": {"max": 0.002, "rms": 0.001}, "b": {"max": 0.5, "rms": 0.1}},
        "captions": {"agreement": 0.995},
    }
    entries = {"encoder": {"precision": "fp16", "verification": checks}, "engine": {"precision": "fp16"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"artifacts": entries}))
    page = report.page(*(tmp_path / f"{name}.json" for name in ("load", "trace", "bench")), [tmp_path])
    assert "the &lt;encoder&gt;" in page and ">1 s</text>" in page
    assert "<td>encoder<td>fp16<td>5.0e-01<td>1.0e-01<td>99.5%" in page
    assert "Model a &lt;model&gt;, 3 s of Poisson arrivals" in page and "Seconds to the first token" in page
    assert "<td>onnx<td>fp32<td>1<td>10.0<td>12.5<td>1.0e-06<td>2.00" in page and "<td>8<td>" not in page


def test_the_roof(tmp_path, monkeypatch):
    """100 GFLOP/s and 10 GB/s: an operation of 2 a byte may do 20, and one of 50 a byte 100 GFLOP/s."""
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    found = {"operation": "a", "seconds": 0.1, "error": 1e-7}
    operations = [
        {**found, "name": "below the slope", "flops": 10**9, "bytes": 5 * 10**8},
        {**found, "name": "below the flat", "flops": 5 * 10**9, "bytes": 10**8},
    ]
    limits = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    (tmp_path / "roofline.json").write_text(json.dumps({**limits, "operations": operations}))
    page = report.page()
    assert "<td>below the slope<td>2.0<td>10.0%<td>50%" in page and "<td>below the flat<td>50.0<td>50.0%<td>50%" in page
    figure = page[page.index("<figure>") : page.index("</figure>")]
    corners = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', figure)[1].split()]
    assert corners[0][1] > corners[1][1] == corners[2][1] and corners[0][0] < corners[1][0] < corners[2][0]
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', figure)]
    assert heights[0] > heights[1] > corners[1][1]  # the flat is above both


def test_the_command(tmp_path, capsys):
    assert report.main(["-o", str(tmp_path / "new" / "report.html")]) == 0
    assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")
    assert report.main(["--trace", "absent.json"]) == 2
    assert capsys.readouterr().err == "error: there is no absent.json\n"
