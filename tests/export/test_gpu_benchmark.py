"""benchmarks/gpu/trt.py, as far as it goes without a GPU: its order of steps, and the comparison on other engines."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import trt as benchmark
from export import trt
from export.runtimes.tensorrt_library import Library
from tests.export.conftest import BUNDLED

ROOT = Path(__file__).resolve().parents[2]


def test_steps_with_tensorrt(tmp_path, monkeypatch):
    """Engines with plugins and without, each verified before the two are compared."""
    monkeypatch.setattr(Library, "load", lambda self: None)
    commands = []
    for module in (benchmark.onnx, benchmark.trt, benchmark.verify):
        monkeypatch.setattr(module, "main", lambda args, name=module.__name__: commands.append((name, args)) or 0)
    monkeypatch.setattr(benchmark.bench, "main", lambda args: 0)
    out = tmp_path / "artifacts"
    out.mkdir()
    args = argparse.Namespace(ckpt=str(BUNDLED), batch=4, precision="fp16", out=tmp_path / "trt.json")
    steps = benchmark.steps(args, out, "sm90")
    names = list(steps)
    assert names[0] == "export" and names[-1] == "bench"
    order = ["trt build without plugins", "trt verify without plugins", "trt build", "trt verify", "trt plugins"]
    assert [name for name in names if name in order] == order
    for name in order[:-1]:
        assert steps[name]() == 0
    (_, bare), (_, check), (_, fused), _ = commands
    commands.clear()
    assert names.index("trt fp8 build") < names.index("trt fp8 verify") < names.index("trt fp8")
    assert steps["trt fp8 build"]() == steps["trt fp8 verify"]() == 0
    (_, eight), (_, checked) = commands
    assert eight[eight.index("--out") + 1] == checked[checked.index("--artifacts") + 1] == str(tmp_path / "fp8")
    assert trt.parser().parse_args(eight).precision == "fp8" and "--plugins" not in eight
    assert "trt fp8" not in benchmark.steps(args, out, "sm86")
    assert bare[bare.index("--out") + 1] == check[check.index("--artifacts") + 1] == str(tmp_path / "plain")
    assert bare[bare.index("--plugins") + 1] == "off" and bare[-1] == "off" and "unet" in bare
    assert fused[fused.index("--plugins") + 1] == "on" and str(out) in fused


def test_engines_are_compared_before_they_are_timed(artifacts, checkpoint, monkeypatch):
    """The same graph twice, in ONNX Runtime; then one of the two is off, and is not timed."""
    found = benchmark.against_plain("onnx", artifacts, artifacts, checkpoint, repeats=3)
    assert found.pop("passed") and found.keys() == {"encoder", "unet", "vae_decoder"}
    for figures in found.values():
        assert figures["speedup"] == figures["plain_s"] / figures["ours_s"] > 0
        assert max(error["rms"] for error in figures["errors"].values()) <= figures["allowed_rms"] < 1e-3
    json.dumps(found)
    monkeypatch.setattr(benchmark, "compare", lambda *_: {"rms": 1.0, "max": 1.0})
    found = benchmark.against_plain("onnx", artifacts, artifacts, checkpoint, repeats=1)
    assert not found["passed"] and "speedup" not in found["encoder"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.trt"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "CUDA device" in done.stderr
