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
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {"ours graph", "ours graph batch 1", "fp8 eager", "fp8 graph"} <= {one["name"] for one in report["encoder"]}
    checks = {one["name"]: one for one in report["checks"]}
    assert all(one["correct"] for one in checks.values())
    assert checks["encoder fp8"]["rms"] > checks["encoder"]["rms"] and checks["encoder, ours graph"]["graphs"] == [1, 2]
    results = report["results"]
    names = {result["name"].split()[0] for result in results}
    operations = {"window_attention", "attention", "upsample_normalize", "linear", "add_norm", "fp8_linear"}
    assert {"encoder", "unet", *operations} < names
    assert len(names) == 11
    assert all(result["correct"] and result["milliseconds"] for result in results)
    assert "ms" not in done.stdout  # a dry run shows no figure
    assert (ROOT / "kernels/tuned.json").read_bytes() == tuned


def test_tuning_tries_every_candidate(tmp_path):
    done = run("--dry-run", "--tune", "--only", "upsample", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0 and "tuned upsample_normalize.forward t8" in done.stdout, done.stdout + done.stderr


def test_a_budget_skips_what_does_not_fit_and_keeps_what_was_measured(tmp_path):
    done = run("--dry-run", "--budget", "4", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0 and "skipped " in done.stderr and " s are left" in done.stderr, (
        done.stdout + done.stderr
    )
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["ceilings"] and report["checks"] and len(report["results"]) < 11


def test_every_design_is_measured_on_every_shape(tmp_path):
    done = run("--dry-run", "--tune", "--only", "attention", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stdout + done.stderr
    configurations = json.loads((tmp_path / "kernels.json").read_text())["configurations"]
    assert all(one["correct"] and one["milliseconds"] for one in configurations)
    designs = {one["config"]["DESIGN"] for one in configurations if one["kernel"] == "window_attention.forward"}
    assert designs == {0, 1, 2, 3}


@pytest.mark.parametrize("word", ["0", "soon"])
def test_a_wrong_budget_is_refused(word):
    done = run("--budget", word)
    assert done.returncode == 2 and f"expected a positive integer, got '{word}'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence():
    done = run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
