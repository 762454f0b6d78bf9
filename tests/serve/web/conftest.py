"""Provide a checkpoint with a text-to-image model: the bundled one, or random weights of its size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def t2i_checkpoint(captioning_checkpoint, tmp_path_factory) -> Path:
    if (captioning_checkpoint / "t2i").is_dir():
        return captioning_checkpoint
    from vlv.train.presets import T2I
    from vlv.train.t2i import build

    folder = tmp_path_factory.mktemp("t2i") / "random"
    shutil.copytree(captioning_checkpoint, folder)
    build(T2I["tiny"]).save(folder / "t2i")
    return folder
