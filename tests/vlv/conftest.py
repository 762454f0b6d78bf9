"""The slim recorded checkpoint, for the tests that take it apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.vlv.official import SLIM, Weights, slim_weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    return slim_weights()


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with everything that belongs to the recorded checkpoint but its weights."""
    return Path(shutil.copytree(SLIM, tmp_path / "source", ignore=lambda *_: ["weights.safetensors", "*.png"]))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """A folder of 12 scenes, 00.png to 11.png, each with its caption in a .txt file beside it."""
    from PIL import Image

    from vlv.data import scenes

    folder, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    for i in range(12):
        scene = scenes.sample(i)
        Image.fromarray(scenes.render(scene)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(scenes.caption(scene, rng))
    return folder
