"""Every Triton kernel in Triton's interpreter: tests/kernels/interpreted, in a process of its own.

Triton decides when a kernel is defined whether it will be interpreted, so these cannot share a process with
tests that compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
FOLDER = Path(__file__).parent / "interpreted"


def test_kernels_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
