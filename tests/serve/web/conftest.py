"""Provide Chromium, a checkpoint with a text-to-image model, and an edge bundle with its page.

The text-to-image model is the bundled one, or random weights of its size.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export import edge
from export.edge_bundle.web_page import INSTALL
from tests.serve.web.browser import SOFTWARE_GPU, WITHOUT_GPU, Browser, chromium
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import load_crop
from vlv.data.scenes import write_scenes
from vlv.model.captioner import Captioner

ROOT = Path(__file__).parents[3]
BUNDLED = ROOT / "assets" / "vlv-tiny"
SCENES = 32


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


def start_browser(folder: Path, flags: list[str]) -> Browser:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    return Browser(path, folder, flags)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with start_browser(tmp_path_factory.mktemp("browser"), WITHOUT_GPU) as running:
        yield running


@pytest.fixture(scope="module")
def gpu_browser(tmp_path_factory):
    """A browser with WebGPU, computed by the CPU."""
    with start_browser(tmp_path_factory.mktemp("gpu"), SOFTWARE_GPU) as running:
        yield running


def needs_packages() -> None:
    """Skip the test where the packages of the extra `edge` are not installed."""
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package, reason="pip install --no-deps gguf==0.19.0 xllamacpp==2026.10.11549")


def library() -> Path:
    """The npm package: where ONNXRUNTIME_WEB says, or in this folder's node_modules."""
    folder = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules" / "onnxruntime-web"))
    if not (folder / "package.json").is_file():
        pytest.skip(f"no onnxruntime-web: {INSTALL}, or ONNXRUNTIME_WEB=its folder")
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    needs_packages()
    out = tmp_path_factory.mktemp("edge") / "bundle"
    flags = ["--no-captions", "--probes", "4", "--web", str(library())]
    assert edge.main(["--ckpt", str(BUNDLED), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5_000_000, SCENES)
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="session")
def checkpoint_captions(scenes) -> dict[str, str]:
    checkpoint = Checkpoint.open(BUNDLED)
    crops = np.stack([load_crop(file, checkpoint.config.image_size) for file in scenes])
    captions = Captioner.load(checkpoint).captions(torch.from_numpy(crops))
    return {file.name: caption for file, caption in zip(scenes, captions, strict=True)}
