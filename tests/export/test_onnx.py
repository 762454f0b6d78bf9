"""Export to ONNX and what it leaves behind: graphs that run as PyTorch does, figures, and exact errors."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx as onnx_library
import pytest
import torch

from export import onnx, verify
from export.builders.onnx import ExportConfig, Exporter, open_export
from export.components import COMPONENTS, Batch, Port
from export.graphs import EncoderGraph
from export.manifest import Artifact, ArtifactError, Manifest
from export.runtimes.factory import open_runtime
from export.runtimes.onnxruntime import OrtSession
from export.runtimes.torch import TorchRuntime
from export.verification.inputs import VerificationInputs
from tests.export.conftest import BUNDLED, LIMITS
from vlv.model.config import PRESETS
from vlv.model.encoder import VLVEncoder

ROOT = Path(__file__).parents[2]


def export(*args) -> int:
    """The command in this process; misuse found by argparse counts as well."""
    try:
        return onnx.main([str(a) for a in args])
    except SystemExit as exit:
        return exit.code


def test_every_component_is_verified(artifacts, checkpoint):
    manifest = Manifest.open(artifacts)
    assert set(manifest.artifacts) == set(COMPONENTS)
    for name, artifact in manifest.artifacts.items():
        figures = artifact.verification
        assert not figures["problems"] and set(figures["outputs"]) == {port.name for port in artifact.outputs}
        for errors in figures["outputs"].values():
            assert errors["rms"] <= figures["allowed"]["rms"] < 1e-4, name
        assert 1 in figures["batches"] and artifact.profile.max in figures["batches"]
        assert manifest.checked(name) == artifact
    assert manifest.artifacts["encoder"].verification["captions"]["agreement"] == 1
    assert not list(artifacts.glob(".*"))


def test_what_is_constant_is_folded(artifacts, checkpoint):
    """No weight is transposed at run time, and the decoder starts at its first cross-attention."""
    model = onnx_library.load(artifacts / "encoder.onnx")
    constants = {i.name for i in model.graph.initializer}
    foldable = [n for n in model.graph.node if n.input and set(n.input) <= constants and n.op_type != "Range"]
    assert not [n.name for n in foldable]
    config = checkpoint.config
    attentions = config.encoder_layers + 2 * config.decoder_layers + config.context_layers
    attentions += 2 * sum(config.vision.depths)
    assert sum(n.op_type == "Softmax" for n in model.graph.node) == attentions - 1


def test_nothing_of_the_machine_is_in_the_graphs(artifacts):
    for file in artifacts.glob("*.onnx"):
        assert str(ROOT).encode() not in file.read_bytes()


def test_reconstruction_is_pytorchs(artifacts, checkpoint):
    """The whole road, 50 steps: PSNR above 40 dB at equal seeds, against diffusers' own pipeline."""
    from vlv.diffusion.t2i import T2I

    engine = open_runtime("onnx", artifacts, checkpoint)
    context = engine.context(VerificationInputs(checkpoint, 4).images[:1])
    expected = T2I.load(checkpoint.t2i).reconstruct(context, seed=3).float()
    found = engine.reconstruct(context, seed=3).float()
    error = (found - expected).square().mean().item()
    assert expected.std() > 5
    assert 10 * torch.tensor(255.0**2 / max(error, 1e-9)).log10() > 40


def test_any_engine_samples_as_diffusers_does(checkpoint):
    """The sampling loop itself, with every sampler, with and without guidance."""
    from vlv.diffusion.samplers import SAMPLERS
    from vlv.diffusion.t2i import T2I

    engine, t2i = TorchRuntime(checkpoint, "cpu"), T2I.load(checkpoint.t2i)
    context = engine.context(VerificationInputs(checkpoint, 4).images[:2])
    for sampler in SAMPLERS:
        for guidance in (1.0, 3.0):
            expected = t2i.reconstruct(context, 3, guidance, 1, sampler).float()
            assert (engine.reconstruct(context, 3, guidance, 1, sampler).float() - expected).abs().max() <= 1


def test_threads_of_a_session(artifacts, checkpoint):
    """As many as the caller leaves to the encoder; without a number those of PyTorch."""
    for threads in (None, 1):
        runtime = open_runtime("onnx", artifacts, checkpoint)
        runtime.threads = threads
        options = runtime.session("encoder").session.get_session_options()
        assert options.intra_op_num_threads == (threads or torch.get_num_threads())


def test_batches_outside_the_profile_are_refused(artifacts, checkpoint):
    engine = open_runtime("onnx", artifacts, checkpoint)
    size = checkpoint.config.image_size
    assert engine.max_batch == 5 and engine.device.type == "cpu" and engine.dtype == "fp32"
    assert engine.encode(torch.zeros(5, 3, size, size, dtype=torch.uint8)).shape[0] == 5
    with pytest.raises(ValueError, match="a batch of 6: this encoder takes 1 to 5; split"):
        engine.encode(torch.zeros(6, 3, size, size, dtype=torch.uint8))
    with pytest.raises(ValueError, match="takes pixels as uint8"):
        engine.encode(torch.zeros(2, 3, size, size))
    with pytest.raises(ValueError, match="takes pixels as uint8"):
        engine.encode(torch.zeros(2, 3, size, size + 1, dtype=torch.uint8))


def test_an_empty_batch_is_refused_by_every_runtime(artifacts, checkpoint):
    """What would run here returns nothing, fails in a library, or ends the process."""
    size = checkpoint.config.image_size
    for runtime in (open_runtime("onnx", artifacts, checkpoint), TorchRuntime(checkpoint, "cpu")):
        with pytest.raises(ValueError, match="encoder takes a batch of at least 1, not an empty one"):
            runtime.encode(torch.zeros(0, 3, size, size, dtype=torch.uint8))


def test_the_smallest_numbers_count_as_zero_in_sessions_alone(tmp_path):
    """Below 1e-38, where processors are slow; the caller's thread computes on as before."""
    edges = [onnx_library.helper.make_tensor_value_info(name, 1, ["b", 4]) for name in "xy"]
    node = onnx_library.helper.make_node("Add", ["x", "x"], ["y"])
    graph = onnx_library.helper.make_graph([node], "g", edges[:1], edges[1:])
    opsets = [onnx_library.helper.make_opsetid("", 20)]
    model = onnx_library.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx_library.save(model, tmp_path / "x.onnx")
    ports = [(Port(name, "float32", (4,)),) for name in "xy"]
    artifact = Artifact("x", "onnx", "", "fp32", 20, *ports, Batch(1, 1, 2), "", "", "", "", {"x.onnx": {}}, "")
    tiny = torch.full((1, 4), 1e-40)
    assert (OrtSession.on_cpu(artifact, tmp_path)(x=tiny)["y"] == 0).all()
    assert (tiny + tiny > 0).all()


def test_fixed_buffers_hold_what_was_last_given(artifacts, checkpoint):
    """What CUDA graphs replay, here on the CPU: new inputs are taken, and the same keys and values are not again."""
    manifest, inputs = Manifest.open(artifacts), VerificationInputs(checkpoint, 4).inputs("unet")[0]
    unet = manifest.checked("unet")
    plain = OrtSession.on_cpu(unet, artifacts)
    fixed = OrtSession(unet, artifacts, ["CPUExecutionProvider"], torch.device("cpu"), graphs=True)
    first = {k: v if k == "timestep" else v[:2].contiguous() for k, v in inputs.items()}
    other = {k: v if k == "timestep" else v[2:4].contiguous() for k, v in inputs.items()}
    for values in (first, {**first, "latents": other["latents"]}, other, first):
        found, expected = fixed(**values)["prediction"], plain(**values)["prediction"]
        assert (found == expected).all()
        held = fixed._held[2, "kv_0"]
        assert held is values["kv_0"]
    assert (fixed(**first)["prediction"] != fixed(**other)["prediction"]).any()


def test_the_same_command_does_nothing_twice(copied, capsys):
    before = {f.name: f.stat().st_mtime_ns for f in copied.iterdir()}
    assert export("--ckpt", BUNDLED, "--out", copied, *LIMITS) == 0
    assert capsys.readouterr().err.count("up to date") == len(COMPONENTS)
    assert {f.name: f.stat().st_mtime_ns for f in copied.iterdir()} == before


def test_captions_that_were_not_compared_are_asked_for(artifacts, checkpoint):
    """What was exported with --no-captions is not up to date without it."""
    encoder = Manifest.open(artifacts).checked("encoder")
    quick = dataclasses.replace(encoder, verification={**encoder.verification, "captions": None})
    for captions, artifact, expected in [(True, encoder, True), (True, quick, False), (False, quick, True)]:
        with open_export(ExportConfig(str(BUNDLED), artifacts, captions=captions), checkpoint) as export:
            assert Exporter(export).is_verified(artifact) == expected


def test_a_damaged_component_alone_is_made_again(copied, capsys):
    os.truncate(copied / "context_kv.onnx", 1000)
    with pytest.raises(ArtifactError, match=r"context_kv.onnx has 1000 bytes .*--components context_kv"):
        Manifest.open(copied).checked("context_kv")
    assert export("--ckpt", BUNDLED, "--out", copied, *LIMITS, "--components", "context_kv", "text_encoder") == 0
    assert capsys.readouterr().err.count("up to date") == 1
    Manifest.open(copied).checked("context_kv")


def test_an_interrupted_export_leaves_the_old_state_and_goes_on(copied, capsys):
    """Killed in the middle: everything is still as before, and the next run finishes."""
    before = (copied / "manifest.json").read_bytes()
    command = [sys.executable, "-m", "export.onnx", "--ckpt", BUNDLED, "--out", copied, *LIMITS, "--force"]
    child = subprocess.Popen([*command, "--components", "text_encoder"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "tracing" not in child.stderr.readline():
        assert child.poll() is None
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    assert (copied / "manifest.json").read_bytes() == before
    Manifest.open(copied).checked("text_encoder")
    assert export("--ckpt", BUNDLED, "--out", copied, *LIMITS, "--components", "text_encoder") == 0
    assert "up to date" in capsys.readouterr().err and not (copied / ".partial").exists()


def test_verify_finds_something_to_check(copied, capsys):
    manifest = Manifest.open(copied)
    engine = dataclasses.replace(manifest.artifacts["encoder"], runtime="rtx", target="sm86")
    manifest.artifacts = {engine.name: engine}
    manifest.save()
    assert verify.main(["--artifacts", str(copied), "--ckpt", str(BUNDLED)]) == 1
    assert "has nothing for onnx" in capsys.readouterr().err


def test_verify_again(artifacts, capsys):
    args = ["--artifacts", str(artifacts), "--ckpt", str(BUNDLED), "--probes", "4", "--no-captions"]
    assert verify.main(args) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:2] == ["artifact", "precision"] and all(line.endswith("ok") for line in out[1:])
    assert len(out) == 1 + 1 + len(COMPONENTS)  # the encoder has two outputs


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--ckpt", "nowhere"], 2, "--ckpt: "),
        (["--ckpt", BUNDLED, "--components", "decoder"], 2, "invalid choice: 'decoder'"),
        (["--ckpt", BUNDLED, "--max-batch", "0"], 2, "expected a positive integer, got '0'"),
        (["--ckpt", BUNDLED, "--probes", "3"], 2, "argument --probes: 3 are too few: at least 4"),
        (["--ckpt", BUNDLED, "--images", "absent.jpg", "--components", "text_encoder"], 2, "absent.jpg"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, args, code, sentence):
    assert export("--out", tmp_path / "out", *args) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and "\n" not in error


def test_a_stage_1_checkpoint_gives_its_context_alone():
    encoder = VLVEncoder(dataclasses.replace(PRESETS["tiny"], llm_width=0)).eval().requires_grad_(False)
    graph = EncoderGraph(encoder)
    assert graph.outputs == ("context",) and "encoder.bottleneck.text.layers.2" in graph.blocks
    pixels = graph.example(2)
    (found,) = graph(*pixels)
    torch.testing.assert_close(found, encoder.context(*pixels), rtol=0, atol=0)


def test_a_checkpoint_without_t2i(random_checkpoint, tmp_path, capsys):
    assert export("--ckpt", random_checkpoint, "--out", tmp_path / "o", "--components", "unet") == 2
    assert "has no t2i/, only its encoder can be exported" in capsys.readouterr().err


def test_two_exports_into_one_folder(copied, capsys):
    import fcntl

    lock = os.open(copied, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert export("--ckpt", BUNDLED, "--out", copied, *LIMITS) == 1
        assert "another export is writing into" in capsys.readouterr().err
    finally:
        os.close(lock)
    assert json.loads((copied / "manifest.json").read_text())["format"] == 2


@pytest.mark.parametrize("module", ["onnx", "verify", "trt", "lint", "bench", "reconstruct"])
def test_help_is_light(module):
    code = (
        f"import sys; from export import {module}\n"
        f"try: {module}.main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
