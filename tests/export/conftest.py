"""The bundled checkpoint, exported once; sizes come from the checkpoint, which may be retrained in other ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from export import onnx
from export.verification import captions
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
def artifacts(built_once) -> Path:
    """All components in float32."""

    def build(out: Path) -> None:
        assert onnx.main(["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS]) == 0

    return built_once("artifacts", build)


@pytest.fixture
def copied(artifacts, tmp_path) -> Path:
    """The same, to damage."""
    return Path(shutil.copytree(artifacts, tmp_path / "copied"))


@pytest.fixture
def few_scenes(monkeypatch):
    """Compare captions of one batch of scenes at most: how many make a verdict certain is tested in test_captions."""
    monkeypatch.setattr(captions, "MAX_SCENES", captions.SCENES)
