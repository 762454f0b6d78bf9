"""What the tests of training share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlv.data import scenes
from vlv.train import presets

NARROW = replace(presets.T2I["smoke"], vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder in which all three stages of the toy recipe went a few steps, through a narrow UNet and VAE."""
    from vlv.train import stage1, stage2, t2i

    folder = tmp_path_factory.mktemp("run")
    t2i.train(NARROW, folder, folder / "t2i", "cpu")
    stage1.train(presets.STAGE1["smoke"], folder / "t2i", folder, folder / "stage1", "cpu")
    stage2.train(presets.STAGE2["smoke"], folder / "stage1", folder, folder / "stage2", "cpu")
    return folder


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """A folder of 12 scenes, 00.png to 11.png, each with its caption in a .txt file beside it."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    for i in range(12):
        scene = scenes.sample(i)
        Image.fromarray(scenes.render(scene)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(scenes.caption(scene, rng))
    return folder
