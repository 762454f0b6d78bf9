"""The slim recorded checkpoint, for the tests that take it apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vlv.official import SLIM, Weights, slim_weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    return slim_weights()


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with everything that belongs to the recorded checkpoint but its weights."""
    return Path(shutil.copytree(SLIM, tmp_path / "source", ignore=lambda *_: ["weights.safetensors", "*.png"]))
