"""The benchmark at a glance: a figure a runtime, its error beside it, and what is missing named."""

from __future__ import annotations

import json

from export import bench
from export.runtimes.benchmark import quantile
from tests.export.conftest import BUNDLED


def test_one_run(artifacts, tmp_path, capsys):
    out = tmp_path / "bench.json"
    args = ["--artifacts", str(artifacts), "--ckpt", str(BUNDLED), "--out", str(out), "--repeats", "3"]
    runtimes = ["torch", "torch.graphs", "onnx", "onnx-cuda"]
    assert bench.main([*args, "--runtimes", *runtimes, "--batches", "1", "2", "9"]) == 0
    result = json.loads(out.read_text())
    assert [(row["runtime"], row["batch"]) for row in result["runs"][:4]] == [
        ("torch", 1), ("onnx", 1), ("torch", 2), ("onnx", 2),
    ]  # fmt: skip
    assert ("onnx", 9) not in {(row["runtime"], row["batch"]) for row in result["runs"]}  # above its profile
    for row in result["runs"]:
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["images_per_s"] > 0
        assert row["error"]["rms"] < 1e-4 and row["peak_bytes"] > 1e7 and not row["wrong"]
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + len(result["runs"])
    import torch

    assert torch.cuda.is_available() or {"onnx-cuda", "torch.graphs"} == set(result["missing"])


def test_quantiles():
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0.5, 0.9, 0.99)] == [2.0, 3.0, 3.0]
