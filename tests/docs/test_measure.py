"""benchmarks.measure runs the project's commands at toy size, and they end in one page; benchmarks.roofline runs."""

from __future__ import annotations

import json

import pytest

from benchmarks import measure, roofline


@pytest.fixture(scope="module")
def folder(captioning_checkpoint, scene_images, tmp_path_factory):
    """What one run with the bundled checkpoint has left."""
    folder = tmp_path_factory.mktemp("report")
    flags = ["--engine", "transformers", "--precisions", "fp32", "--batches", "1", "--repeats", "1"]
    flags += ["--runtimes", "torch", "onnx"]  # torch.compile alone takes longer than all of this
    pictures = [str(scene_images / f"{i:02}.png") for i in range(4)]
    load = ["--rates", "4", "--seconds", "1"]
    assert measure.main([*pictures, "--ckpt", str(captioning_checkpoint), *flags, *load, "-o", str(folder)]) == 0
    return folder


def test_all_of_it_is_on_the_page(folder):
    page = (folder / "report.html").read_text()
    (point,) = json.loads((folder / "load.json").read_text())["sweep"]
    assert point["statuses"] == {"200": point["requests"]}
    run = next(r for r in json.loads((folder / "bench.json").read_text())["runs"] if r["runtime"] == "onnx")
    assert f"<td>onnx<td>fp32<td>1<td>{run['p50_ms']:.1f}" in page
    assert len((folder / "captions.jsonl").read_text().splitlines()) == 4
    assert "decoding" in page and "Seconds to the first token" in page and "Exported here" in page


def test_a_command_that_fails_stops_it(captioning_checkpoint, tmp_path, capfd):
    flags = ["--ckpt", "/absent", "-o", str(tmp_path), "--engine", "transformers"]
    assert measure.main(["x.png", *flags]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: export.onnx ended with ")


def test_the_roofline_at_toy_size(tmp_path):
    assert roofline.main(["--toy", "--repeats", "1", "-o", str(tmp_path / "roof.json")]) == 0
    found = json.loads((tmp_path / "roof.json").read_text())
    assert {"linear", "window_attention"} <= {entry["operation"] for entry in found["operations"]}
    assert all(entry["seconds"] > 0 and entry["error"] < 1e-5 for entry in found["operations"])
