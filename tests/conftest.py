"""Fixtures that several packages share. Whatever is slow to build is built once a run of the tests."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

BUNDLED = Path(__file__).parents[1] / "assets" / "vlv-tiny"
# Files of more than half a minute, the longest first. `make test` gives its workers a file at a time in this order:
# whoever is last then has little left.
LONGEST = (
    "vlv/train/test_trainer.py", "test_readme.py", "export/test_precisions.py", "serve/test_caption_cli.py",
    "export/test_overflow.py", "kernels/test_interpreted.py", "serve/engines/test_vllm.py",
    "serve/engines/test_placements.py", "export/test_captions.py", "serve/test_vllm_plugin.py",
    "export/test_plugins.py", "docs/test_measure.py", "serve/test_server_process.py", "docs/test_docs.py",
    "kernels/test_gpu_benchmark.py",
    "serve/engines/test_remote.py", "export/test_trt.py", "export/test_edge.py", "export/test_qdq.py",
    "vlv/train/test_paper_stages.py", "export/test_onnx.py", "export/test_int8.py", "vlv/evaluate/test_images.py",
    "serve/http/test_admission.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    here = Path(__file__).parent
    place = {here / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder with a name: the first of the workers that needs it builds it, and each gets a copy to itself."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def copy_of(name: str, build: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return Path(shutil.copytree(folder, tmp_path_factory.mktemp(name) / name))

    return copy_of


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory) -> Path:
    """A whole checkpoint folder of the tiny preset with random weights, but no t2i/."""
    import torch

    from vlv.checkpoints import folder as checkpoint
    from vlv.model.config import PRESETS
    from vlv.model.encoder import VLVEncoder
    from vlv.train.config import Synthetic
    from vlv.train.initialize import build_llm

    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    torch.manual_seed(0)
    llm, tokenizer = build_llm(Synthetic(scenes=0))
    for name, weight in llm.named_parameters():
        # transformers' initial weights give all tokens nearly one logit, and then repeat one token: two
        # implementations would break ties differently, and captions would not depend on the picture
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (4 if "layers" in name else 1))
    checkpoint.save(folder, VLVEncoder(PRESETS["tiny"]))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="session")
def captioning_checkpoint() -> Path:
    """The bundled checkpoint."""
    return BUNDLED


@pytest.fixture(scope="session")
def scene_images(tmp_path_factory) -> Path:
    """A folder of 64 held-out scenes as PNG files, 00.png to 63.png."""
    from PIL import Image

    from vlv.data import scenes

    folder = tmp_path_factory.mktemp("scenes")
    for i in range(64):
        Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + i))).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def bomb() -> Callable[[int, int], bytes]:
    """Makes a PNG whose header announces a width and height that its data does not have."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def make(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
        data = chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")

    return make
