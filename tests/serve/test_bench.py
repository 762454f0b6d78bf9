"""Test serve.bench against a server of known speed."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from serve.bench import main
from serve.reports.bench_page import WIDTH, plot
from serve.reports.load_test import Request, quantiles
from tests.serve.serving import Running, Scripted
from vlv.checkpoints.folder import Checkpoint


class LLMEngine(Scripted):
    """20 ms a token, so a caption takes as long as it has tokens."""

    pace = 0.02


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine, 16)
    yield running
    running.stop()


def test_a_sweep(server, scene_images, tmp_path):
    flags = ["--rates", "3,60", "--seconds", "3", "--max-tokens", "20", "--price", "3.6", "--slo-e2e", "1.5"]
    assert main([str(scene_images), "--url", server.url, "-o", str(tmp_path / "b.json"), *flags]) == 0
    low, high = json.loads((tmp_path / "b.json").read_text())["sweep"]
    assert low["statuses"] == {"200": low["requests"]} and 2 <= low["requests"] <= 25
    # lower bounds only: how much slower it gets depends on what else the machine does
    assert low["tpot"]["p50"] >= 0.02 and low["e2e"]["p50"] >= 20 * 0.02 and low["ttft"]["p50"] < low["e2e"]["p50"]
    assert low["goodput_per_second"] <= low["requests"] / 3 + 1e-3  # rounded
    assert low["cost_per_1000"] == pytest.approx(1 / low["answered_per_second"], rel=1e-2)
    # capacity 16 at 0.4 s a caption: at most 40 a second, and the rest is refused rather than queued
    assert high["statuses"]["503"] > 10 and 0 < high["answered_per_second"] <= 41
    for point in (low, high):
        assert point["goodput_per_second"] <= point["answered_per_second"]
    page = (tmp_path / "b.html").read_text()
    assert page.count("<svg") == 5 and "NaN" not in page and "http" not in page.lower()


def test_what_a_request_adds():
    request = Request("200", [0.5, 0.6, 0.9], tokens=5, end=1.0)
    measures = request.measures
    assert measures["ttft"] == [0.5] and measures["tpot"] == [pytest.approx(0.1)] and measures["e2e"] == [1.0]
    assert measures["itl"] == pytest.approx([0.1, 0.3])
    assert quantiles(list(map(float, range(1, 101)))) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert quantiles([]) == {"p50": None, "p90": None, "p99": None}


def test_no_server(scene_images, tmp_path, capsys):
    assert main([str(scene_images), "--url", "http://127.0.0.1:9", "-o", str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err.startswith("error: --url: no captioning server answers at http://127.0.0.1:9")
    assert main([str(scene_images), "--url", "localhost:9", "-o", str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err == "error: --url localhost:9: expected a URL such as http://127.0.0.1:8000\n"


def test_labels_of_a_plot_are_whole():
    """Inside the drawing and beside each other, also for very large and very small numbers."""
    for y in (0.0000123, 0.5, 123456.0):
        svg = plot("Seconds", [1.0, 2.5, 120000.0], {"p50": [y, y, y], "p90": [y] * 3, "p99": [None, y, y]})
        labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?[^>]*>([^<]*)', svg)
        rows = {}
        for x, row, anchor, text in labels:
            width = 6.5 * len(text)  # of a 12 px sans-serif font
            left = float(x) - {"end": width, "middle": width / 2}.get(anchor, 0)
            assert left >= 0 and left + width <= WIDTH, (text, left)
            rows.setdefault(row, []).append((left, left + width))
        for spans in rows.values():
            spans.sort()
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), spans
        assert "offered rate (1/s)" in svg
