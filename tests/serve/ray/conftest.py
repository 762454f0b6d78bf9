"""Pictures for the tests of serve.ray_batch, a broken one among them, and the arguments of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serve import ray_batch
from serve.command import open_model
from serve.ray.stages import StageOptions

COUNT = 12


@pytest.fixture
def pictures(scene_images, tmp_path) -> Path:
    """A folder of 12 pictures and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in sorted(scene_images.glob("*.png"))[:COUNT]:
        shutil.copy(file, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def command(captioning_checkpoint, pictures, tmp_path) -> list[str]:
    """What is said to serve.ray_batch: units of 4, the reference engine."""
    flags = ["--engine", "transformers", "--max-tokens", "60", "--unit", "4", "--cpus", "4", "--url-column", "url"]
    actors = ["--decoders", "1", "--encoders", "1", "--llms", "1"]
    return [str(pictures), str(tmp_path / "out"), "--ckpt", str(captioning_checkpoint), *flags, *actors]


@pytest.fixture
def args(command):
    return ray_batch.parser().parse_args(command)


@pytest.fixture
def options(args) -> StageOptions:
    return StageOptions(open_model(args).options, args.output, args.format, args.raw)
