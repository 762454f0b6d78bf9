"""Provide Chromium, and a checkpoint with a text-to-image model: the bundled one, or random weights of its size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.serve.web.browser import Browser, chromium


@pytest.fixture(scope="session")
def t2i_checkpoint(captioning_checkpoint, tmp_path_factory) -> Path:
    if (captioning_checkpoint / "t2i").is_dir():
        return captioning_checkpoint
    from vlv.train.config import T2I
    from vlv.train.initialize import build_t2i

    folder = tmp_path_factory.mktemp("t2i") / "random"
    shutil.copytree(captioning_checkpoint, folder)
    build_t2i(T2I["tiny"]).save(folder / "t2i")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = chromium()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with Browser(path, tmp_path_factory.mktemp("browser")) as running:
        yield running
