"""Precisions: what they cost, how drift is told and located, and that it is refused."""

from __future__ import annotations

import dataclasses

import onnx as onnx_library
import pytest
import torch

from export.manifest import Manifest
from export.quantize import precision as precisions
from export.runtimes.onnxruntime import OrtSession
from export.verification.captions import SCENES, Agreement
from export.verification.layer_drift import drift
from export.verification.verifier import Verifier, compare, hopeless
from tests.export.toy import Toy, export, scaled


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_encoder_with_its_error_and_its_captions(tmp_path, precision, request):
    """More than float32's error, less than the precision explains; kept exactly where the captions hold."""
    if precision == "int8":  # near the limit: a thousand scenes for each choice of blocks
        request.getfixturevalue("few_scenes")
    code = export(tmp_path, precision, "--components", "encoder")
    if precision == "int8" and code == 1:  # whether eight bits carry the captions is the checkpoint's matter
        assert not (tmp_path / "encoder.onnx").exists() and not (tmp_path / "manifest.json").exists()
        assert export(tmp_path, precision, "--components", "encoder", "--allow-drift") == 0
    else:
        assert code == 0
    artifact = Manifest.open(tmp_path).checked("encoder")
    figures = artifact.verification
    assert 1e-5 < figures["outputs"]["prompts"]["rms"] <= figures["allowed"]["rms"]
    captions = figures["captions"]
    assert captions["images"] % SCENES == 4 and captions["tokens"] > 40  # the noise is not captioned
    assert Agreement(**captions).passes(0.99) == (code == 0) == (not figures["problems"])
    ops = {node.op_type for node in onnx_library.load(tmp_path / artifact.main_file).graph.node}
    assert ("MatMulInteger" in ops) == (precision == "int8")


@pytest.mark.parametrize("precision", ["bf16", "mixed", "int8-static", "int8-trt"])
def test_small_component_in_every_precision(tmp_path, precision):
    assert export(tmp_path, precision, "--components", "text_encoder", "--no-captions") == 0
    artifact = Manifest.open(tmp_path).checked("text_encoder")
    assert artifact.precision == precision and not artifact.verification["problems"]
    assert artifact.opset == (22 if precision == "bf16" else 20)


def test_mixed_keeps_as_few_blocks_as_it_needs():
    """What overflows inside a block is found; what overflows between blocks, no choice of blocks can help."""
    inputs = {"x": torch.randn(16, 64)}
    errors = precisions.own_errors(Toy(), Toy(), inputs)
    assert errors["layers.1"] == float("inf") and errors["layers.0"] < 1e-3
    with pytest.raises(precisions.NotPossible, match="use fp32 or bf16"):
        precisions.prepare(Toy(), Toy, "mixed", [inputs])
    small = lambda: scaled(Toy())  # noqa: E731
    graph, fp32_blocks = precisions.prepare(small(), small, "mixed", [inputs])
    assert fp32_blocks == ()
    with torch.inference_mode():
        assert compare(graph(inputs["x"]), small()(inputs["x"]))["rms"] < 5e-3


def test_fp32_blocks_compute_in_float32():
    toy = scaled(Toy()).cast(torch.float16, fp32_blocks=["layers.1"])
    dtypes = {}
    for path in toy.blocks:
        toy.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: dtypes.update({path: args[0].dtype})
        )
    toy(torch.randn(2, 64))
    assert [layer.weight.dtype for layer in toy.layers] == [torch.float16, torch.float32, torch.float16]
    assert dtypes["layers.1"] == torch.float32 and dtypes["layers.2"] == torch.float16


def test_the_first_block_that_drifts_is_named(copied, checkpoint, probes):
    """A weight of the second layer is changed in the file: the report names that layer, not what follows from it."""
    artifact = Manifest.open(copied).checked("text_encoder")
    second = list(artifact.blocks)[1]
    model = onnx_library.load(copied / artifact.main_file)
    graph = probes.reference.session("text_encoder").graph
    wanted = graph.get_parameter(f"{second}.mlp.fc1.bias").detach().numpy()
    for constant in model.graph.initializer:
        array = onnx_library.numpy_helper.to_array(constant)
        if array.shape == wanted.shape and (array == wanted).all():
            constant.CopyFrom(onnx_library.numpy_helper.from_array(array + 0.05, constant.name))
            break
    else:
        pytest.fail("the bias is not in the graph")
    onnx_library.save(model, copied / artifact.main_file)
    report = drift(artifact, copied, graph, probes.inputs("text_encoder")[0])
    assert [b["block"] for b in report] == list(artifact.blocks)
    assert [b["drifts"] for b in report][:2] == [False, True]
    session = OrtSession.on_cpu(artifact, copied)
    problems = Verifier(checkpoint, probes, captions=False).check(artifact, session, copied)["problems"]
    assert problems[-1] == f"the first block that drifts is {second}"


def test_drift_is_refused_unless_allowed(tmp_path, capsys, monkeypatch):
    """A precision whose tolerance is (made) too small leaves no file; --allow-drift keeps it, and says so."""
    monkeypatch.setattr("export.verification.verifier.tolerance", lambda *_: 1e-9)
    assert export(tmp_path, "fp32", "--components", "context_kv") == 0  # exact: nothing to refuse
    assert export(tmp_path, "fp16", "--components", "context_kv") == 1
    error = capsys.readouterr().err
    assert "fp16 explains 1.0e-09" in error and "keep it with --allow-drift" in error
    assert Manifest.open(tmp_path).checked("context_kv").precision == "fp32"
    assert export(tmp_path, "fp16", "--components", "context_kv", "--allow-drift") == 0
    artifact = Manifest.open(tmp_path).checked("context_kv")
    assert artifact.verification["problems"] and "--allow-drift" in artifact.command
    assert "drifts" in capsys.readouterr().out
    assert export(tmp_path, "fp16", "--components", "context_kv", "--allow-drift") == 0
    assert "up to date" in capsys.readouterr().err
    assert export(tmp_path, "fp16", "--components", "context_kv") == 1, "what was allowed once is not taken for good"


def test_garbage_is_never_kept(artifacts, checkpoint, probes):
    """NaN and constant outputs are told apart from drift, and no flag lets them pass."""
    artifact = Manifest.open(artifacts).checked("text_encoder")

    class Broken(OrtSession):
        change = staticmethod(lambda value: value * float("nan"))

        def _run(self, values, batch):
            return {name: self.change(value) for name, value in super()._run(values, batch).items()}

    verifier = Verifier(checkpoint, probes, captions=False)
    session = Broken.on_cpu(artifact, artifacts)
    figures = verifier.check(dataclasses.replace(artifact, blocks={}), session, artifacts)
    assert hopeless(figures) and any("not finite" in p for p in figures["problems"])
    first = []

    def same(value):
        first.append(value[:1])
        return first[0].expand_as(value)

    for change, word in ((torch.zeros_like, "constant"), (same, "same for every")):
        session.change = change
        figures = verifier.check(dataclasses.replace(artifact, blocks={}), session, artifacts)
        assert hopeless(figures) and any(word in p for p in figures["problems"])


def test_changed_captions_are_a_problem(artifacts, checkpoint, probes):
    artifact = Manifest.open(artifacts).checked("encoder")

    class Shuffled(OrtSession):
        def _run(self, values, batch):
            return {name: value.flip(0) for name, value in super()._run(values, batch).items()}

    figures = Verifier(checkpoint, probes).check(artifact, Shuffled.on_cpu(artifact, artifacts), artifacts)
    assert any("captions change" in p for p in figures["problems"]) and not hopeless(figures)
