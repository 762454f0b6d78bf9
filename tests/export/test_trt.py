"""TensorRT-RTX engines, really built here without a GPU; what cannot be done here says what it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from export import trt
from export.manifest import ArtifactError, Manifest
from export.runtimes.base import RuntimeUnavailable
from export.runtimes.factory import open_runtime
from export.runtimes.tensorrt_library import LIBRARIES
from tests.export.conftest import BUNDLED, LIMITS

PARTS = ("encoder", "unet", "vae_decoder")


def build(out, *args: str) -> int:
    try:
        return trt.main(["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS, *args])
    except SystemExit as exit:
        return exit.code


@pytest.fixture(scope="module")
def rtx() -> str:
    try:
        return f"TensorRT-RTX {LIBRARIES['rtx'].load().__version__}"
    except RuntimeUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def engines(artifacts, rtx):
    """The folder of the artifacts, with engines for two targets."""
    for target in ("sm86", "sm89"):
        assert build(artifacts, "--target", target, "--components", *PARTS) == 0
    return artifacts


def test_engines_for_two_targets(engines, rtx):
    manifest = Manifest.open(engines)
    for name in PARTS:
        for target in ("sm86", "sm89"):
            artifact, graph = manifest.checked(name, "rtx", target), manifest.artifacts[name]
            assert (artifact.builder, artifact.graph, artifact.precision) == (rtx, graph.graph, "fp32")
            assert artifact.files[artifact.main_file]["bytes"] > 10_000
            assert f"--target {target}" in artifact.command and "export.trt" in artifact.command
        files = [manifest.artifacts[f"{name}@rtx-{target}"].files for target in ("sm86", "sm89")]
        assert files[0] != files[1]


def test_an_engine_is_kept_as_long_as_it_fits(engines, capsys):
    capsys.readouterr()
    assert build(engines, "--target", "sm89", "--components", "vae_decoder") == 0
    assert "vae_decoder@rtx-sm89: up to date" in capsys.readouterr().err
    assert build(engines, "--target", "sm89", "--components", "vae_decoder", "--force") == 0
    assert "vae_decoder@rtx-sm89: built in" in capsys.readouterr().err
    manifest = Manifest.open(engines)
    there = manifest.find("vae_decoder", "rtx", "sm89")
    assert manifest.current(there) and not manifest.current(replace(there, refittable=True))


def test_a_target_that_it_does_not_know(engines, rtx, capsys):
    assert build(engines, "--target", "sm90", "--components", "vae_decoder") == 1
    assert "builds for sm75, sm80, sm86, sm89" in capsys.readouterr().err
    assert build(engines, "--target", "hopper") == 2


def test_tensorrt_needs_its_gpu_and_its_library(artifacts, capsys):
    """Where either is missing, one sentence; the code behind is the same as for TensorRT-RTX."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: benchmarks/gpu/trt.py runs this path")
    code = build(artifacts, "--target", "sm90", "--runtime", "trt", "--components", "vae_decoder")
    error = capsys.readouterr().err.strip()
    assert code in (1, 2) and "\n" not in error
    assert "python -m pip install" in error or "this machine has none" in error
    for word in ("rtx", "trt", "onnx-cuda", "onnx-trt"):
        with pytest.raises(ArtifactError, match=r"needs a CUDA device|pip install"):
            open_runtime(word, artifacts)


def test_refit_needs_the_gpu(engines, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: benchmarks/gpu/trt.py runs this path")
    assert build(engines, "--target", "sm89", "--components", "vae_decoder", "--refit", "--force") == 1
    assert "--refit loads the engine" in capsys.readouterr().err
    Manifest.open(engines).checked("vae_decoder", "rtx", "sm89")
