"""Every command of the README runs; training and evaluation at the smoke preset's size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]
BY_CI = {"make demo", "make test"}  # .ci/run itself runs these two


def test_ci_runs_the_make_commands():
    assert set(COMMANDS) >= BY_CI
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert set(script) >= BY_CI


def test_commands(tmp_path):
    """In the README's order, since later ones read what earlier ones write."""
    run = tmp_path / "runs" / "smoke"
    for command in (c for c in COMMANDS if c not in BY_CI):
        words = shlex.split(
            command.replace("--preset tiny", f"--preset smoke --run {run}").replace("runs/tiny", str(run))
        )
        assert words[:2] == [".venv/bin/python", "-m"], command
        if words[2] == "vlv.evaluate.scenes":
            words += ["--count", "4", "--captions-only"]
        words = [str(tmp_path / w) if w == "captions.jsonl" or w.startswith("out/") else w for w in words]
        if "--ckpt" in words and not (ROOT / words[words.index("--ckpt") + 1]).exists():
            pytest.fail(f"{command}: there is no such checkpoint")
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=ROOT,
            env={**os.environ, "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"


def test_images_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
