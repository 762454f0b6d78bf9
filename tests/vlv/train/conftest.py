"""What the tests of training share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlv.train.config import STAGE1, STAGE2, T2I, Inputs, RunOptions

NARROW = replace(T2I["smoke"], vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))


@pytest.fixture(scope="session")
def run(built_once):
    """A run folder in which all three stages of the toy recipe went a few steps, through a narrow UNet and VAE."""
    from vlv.train.stage1 import train_stage1
    from vlv.train.stage2 import train_stage2
    from vlv.train.t2i import train_t2i

    def build(folder):
        train_t2i(NARROW, RunOptions(folder, folder / "t2i"))
        train_stage1(STAGE1["smoke"], Inputs(), RunOptions(folder, folder / "stage1"))
        train_stage2(STAGE2["smoke"], Inputs(), RunOptions(folder, folder / "stage2"))

    return built_once("run", build)
