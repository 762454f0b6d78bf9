"""Reconstruction through an exported model: the same pictures as PyTorch's from the same command."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from export import reconstruct
from export.runtimes.factory import open_runtime
from tests.export.conftest import BUNDLED
from vlv import reconstruct as torch_reconstruct
from vlv.checkpoints.folder import Checkpoint
from vlv.diffusion.scheduler import DiffusionError


def draw(main, images, out, *more: str) -> dict[str, np.ndarray]:
    assert main([*map(str, images), "--ckpt", str(BUNDLED), "-o", str(out), "--steps", "3", "--batch", "2", *more]) == 0
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in out.iterdir()}


def test_pictures_are_pytorchs(artifacts, scene_images, tmp_path):
    images = sorted(scene_images.iterdir())[:3]
    there = ["--backend", "onnx", "--artifacts", str(artifacts)]
    for name, flags in (("plain", ["--sampler", "dpm++"]), ("between", ["--interpolate", "3"])):
        some = images if name == "plain" else images[:2]
        expected = draw(torch_reconstruct.main, some, tmp_path / f"{name}-torch", *flags)
        found = draw(reconstruct.main, some, tmp_path / name, *flags, *there)
        assert found.keys() == expected.keys() and len(found) == 4
        assert all(abs(found[key] - expected[key]).max() <= 1 for key in found)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--backend", "onnx"], "--backend onnx needs --artifacts"),
        (["--backend", "torch", "--artifacts", "there"], "--backend torch takes no --artifacts"),
        (["--backend", "vulkan"], "invalid choice: 'vulkan'"),
        (["--artifacts", "there", "--t2i", "sd"], "are vlv.reconstruct's"),
        (["--artifacts", "there", "--guidance", "nan"], "--guidance nan: expected a finite number"),
        (["--artifacts", "there", "--seed", str(2**64)], "expected an integer of 64 bits"),
    ],
)
def test_misuse(args, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        reconstruct.main(["a.png", "--ckpt", "c", *args])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_a_batch_that_was_not_exported(artifacts, scene_images, tmp_path, capsys):
    images = [str(file) for file in sorted(scene_images.iterdir())[:3]]
    there = ["--artifacts", str(artifacts), "--batch", "3", "-o", str(tmp_path / "o")]
    assert reconstruct.main([*images, "--ckpt", str(BUNDLED), *there]) == 1
    assert "split the batch, or export with another --max-batch or --max-images" in capsys.readouterr().err
    assert reconstruct.main([*images, "--ckpt", str(BUNDLED), "--artifacts", str(tmp_path / "none"), *there[2:]]) == 1
    assert "no artifacts in" in capsys.readouterr().err


def test_a_context_that_is_not_finite_is_refused_instead_of_black(artifacts):
    checkpoint = Checkpoint.open(BUNDLED)
    runtime = open_runtime("onnx", artifacts, checkpoint)
    context = runtime.empty_context()
    assert runtime.reconstruct(context, steps=2).shape[0] == 1
    with pytest.raises(DiffusionError, match="latents are not finite"):
        runtime.reconstruct(context * float("nan"), steps=2)
    with pytest.raises(DiffusionError, match=r"750 steps: .* takes 1 to 500, or 1000"):
        runtime.reconstruct(context, steps=750)
