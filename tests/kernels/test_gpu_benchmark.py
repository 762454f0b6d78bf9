"""benchmarks/gpu/kernels.py, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
ROOT = Path(__file__).resolve().parents[2]


def run(*args: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_dry_run_checks_every_operation_and_both_models(tmp_path):
    tuned = (ROOT / "kernels/tuned.json").read_bytes()
    done = run("--dry-run", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "kernels.json").read_text())["results"]
    names = {result["name"].split()[0] for result in results}
    assert {"window_attention", "attention", "upsample_normalize", "encoder", "unet"} < names and len(names) == 10
    assert all(result["correct"] and result["milliseconds"] for result in results)
    assert "ms" not in done.stdout  # a dry run shows no figure
    assert (ROOT / "kernels/tuned.json").read_bytes() == tuned


def test_tuning_tries_every_candidate(tmp_path):
    done = run("--dry-run", "--tune", "--only", "geglu", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0 and "tuned geglu.forward f32" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence():
    done = run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
