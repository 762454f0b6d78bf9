"""TensorRT-RTX engines, really built here without a GPU; what cannot be done here says what it needs."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from export import graphs, trt
from export.builders import tensorrt
from export.components import COMPONENTS
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
def engines(artifacts, rtx, tmp_path_factory):
    """A copy of the artifacts, with engines for two targets."""
    folder = Path(shutil.copytree(artifacts, tmp_path_factory.mktemp("engines") / "artifacts"))
    for target in ("sm86", "sm89"):
        assert build(folder, "--target", target, "--components", *PARTS) == 0
    return folder


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


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--target", "sm75"], 2, "--precision fp32: TensorRT-RTX builds fp16 and int8-trt alone for Turing"),
        (["--target", "sm75", "--precision", "bf16", "--components", "unet"], 2, "fp16 and int8-trt alone for Turing"),
        (["--target", "sm75", "--precision", "fp16"], 2, "TensorRT-RTX builds no encoder for Turing"),
        (["--target", "sm86", "--refittable"], 1, "only on a machine with a GPU, and this one has none"),
        (["--target", "sm90"], 1, "builds for sm75, sm80, sm86, sm89"),
        (["--target", "sm87"], 2, "TensorRT-RTX does not build for Jetson Orin"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(rtx, tmp_path, capsys, args, code, sentence):
    import torch

    if torch.cuda.is_available() and "--refittable" in args:
        pytest.skip("a GPU is here: benchmarks/gpu/trt.py runs this path")
    assert build(tmp_path / "out", *args) == code
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error and not (tmp_path / "out").exists()


def test_turing_and_refitting_are_refused_because_tensorrt_rtx_fails(artifacts, rtx):
    """Should a later version build them, the refusals can go."""
    import torch

    if not rtx.startswith("TensorRT-RTX 1.7."):
        pytest.skip(f"{rtx}: see whether it builds for Turing")
    graph = Manifest.open(artifacts).checked("context_kv")
    arguments = (LIBRARIES["rtx"], str(artifacts / graph.main_file), graph.inputs, graph.profile)
    with pytest.raises(ArtifactError, match="FP32 GEMM is not supported"):
        tensorrt.build(*arguments, "sm75")
    if not torch.cuda.is_available():
        with pytest.raises(ArtifactError, match="cannot build"):
            tensorrt.build(*arguments, "sm86", refittable=True)
    assert tensorrt.build(*arguments, "sm86")[0]


@pytest.mark.parametrize("args", [["--target", "sm87"], ["--target", "sm90", "--runtime", "trt", "--print-trtexec"]])
def test_trtexec_commands(checkpoint, tmp_path, capsys, args):
    """One for every component, with the shapes of an export's profile; nothing is made here."""
    assert build(tmp_path / "out", "--precision", "fp16", *args) == (2 if "sm87" in args else 0)
    lines = capsys.readouterr().out.splitlines()
    export, commands = shlex.split(lines[0]), [shlex.split(line) for line in lines[1:]]
    assert export[:3] == ["python", "-m", "export.onnx"] and export[export.index("--precision") + 1] == "fp16"
    assert [command[1] for command in commands] == [f"--onnx={name}.onnx" for name in COMPONENTS]
    assert all(command[0] == "trtexec" and "--stronglyTyped" in command for command in commands)
    size = checkpoint.config.image_size
    shapes = [flag for flag in commands[0] if "Shapes=" in flag]
    assert shapes == [f"--{kind}Shapes=pixels:{n}x3x{size}x{size}" for kind, n in (("min", 1), ("opt", 5), ("max", 5))]
    unet = commands[list(COMPONENTS).index("unet")]
    assert not any("timestep" in flag for flag in unet), "its shape is fixed"
    assert any("kv_0:4x2x" in flag for flag in unet if flag.startswith("--maxShapes")), "guidance doubles two images"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_skeletons_are_the_components(checkpoint, name):
    """The inputs that trtexec's shapes come from, without the weights."""
    bare, loaded = graphs.skeleton(checkpoint, name), graphs.load(checkpoint, name)
    assert (bare.inputs, bare.outputs, bare.blocks) == (loaded.inputs, loaded.outputs, loaded.blocks)
    assert all(parameter.is_meta for parameter in bare.parameters())
