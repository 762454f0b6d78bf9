"""The bundled checkpoint, exported once; sizes come from the checkpoint, which may be retrained in other ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from export import onnx
from export.verification.inputs import VerificationInputs
from vlv.checkpoints.folder import Checkpoint

BUNDLED = Path(__file__).parents[2] / "assets" / "vlv-tiny"
LIMITS = ["--max-batch", "5", "--max-images", "2"]


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(BUNDLED)


@pytest.fixture(scope="module")
def probes(checkpoint) -> VerificationInputs:
    return VerificationInputs(checkpoint, 6)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Path:
    """All components in float32."""
    out = tmp_path_factory.mktemp("artifacts") / "fp32"
    assert onnx.main(["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS]) == 0
    return out


@pytest.fixture
def copied(artifacts, tmp_path) -> Path:
    """The same, to damage."""
    return Path(shutil.copytree(artifacts, tmp_path / "copied"))
