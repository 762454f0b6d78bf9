"""INT8: which products it takes, which blocks stay in float32, and what its ranges come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import onnx as onnx_library
import onnxruntime
import pytest
import torch

from export import graphs, trace
from export.builders.onnx import Exporter
from export.components import COMPONENTS, Batch
from export.manifest import Artifact, Manifest
from export.quantize.int8 import to_int8
from export.quantize.precision import block_costs, cheapest_blocks, exclusion_candidates
from export.verification.inputs import VerificationInputs
from export.verification.verifier import compare
from tests.export.toy import Toy, export, scaled


def test_int8_leaves_excluded_blocks_alone(tmp_path):
    """The products of a block that is kept are no 8-bit ones, and its error is none."""
    toy = scaled(Toy())
    traced = trace.to_onnx(toy, tmp_path / "toy.onnx", Batch(1, 1, 4), 20)
    inputs = {"x": torch.randn(4, 64)}
    errors = []
    for excluded, products in (((), 3), (("layers.1",), 2), (toy.blocks, 0)):
        work_dir = tmp_path / str(products)
        work_dir.mkdir()
        written = to_int8(traced, tmp_path, work_dir, excluded_blocks=excluded)
        nodes = onnx_library.load(work_dir / written.files[0]).graph.node
        assert sum(node.op_type == "MatMulInteger" for node in nodes) == products
        session = onnxruntime.InferenceSession(work_dir / "toy.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": inputs["x"].numpy()})[0])
        errors.append(compare(found, toy(inputs["x"]).detach())["rms"])
    assert errors[0] > errors[1] > 1e-4 > errors[2]


@pytest.fixture
def exporting(tmp_path, monkeypatch):
    """A function: precision, float32 blocks, enough excluded ones -> problems, attempts, what is published."""
    shares = {"a": 0.02, "b": 0.03, "c": 0.1, "d": 0.3, "e": 0.55}
    monkeypatch.setattr("export.builders.onnx.precision.block_costs", lambda graph: shares)
    monkeypatch.setattr("export.builders.onnx.graph_lint.problems", lambda *_: [])
    monkeypatch.setattr("export.builders.onnx.OrtSession.on_cpu", lambda *_: None)

    def run(precision, fp32_blocks, enough, allow_drift=False):
        tried, published = [], []

        class Stub(Exporter):
            def __init__(self):
                graph = SimpleNamespace(blocks=tuple(shares))
                session = SimpleNamespace(graph=graph)
                self.inputs = SimpleNamespace(reference=SimpleNamespace(session=lambda name: session))
                self.manifest = SimpleNamespace(
                    sampling=True, publish=lambda artifact, work_dir: published.append(artifact)
                )
                self.verifier = SimpleNamespace(check=check, references=lambda name: None)
                self.config = SimpleNamespace(allow_drift=allow_drift)
                self.work_dir, self._trace = tmp_path, lambda expected: (graph, None, fp32_blocks)

            def _write(self, expected, graph, traced):
                tried.append(expected.excluded_blocks)
                return dataclasses.replace(expected, files={"x": {}})

        def check(artifact, session, folder):
            return {"problems": [] if len(artifact.excluded_blocks) >= enough else ["too far"]}

        expected = Artifact("encoder", "onnx", "", precision, 20, (), (), Batch(1, 1, 1), "", "", "", "", {}, "")
        return Stub().export(expected), tried, published

    return run


@pytest.mark.parametrize("enough", [1, 2, 4, 99])
def test_int8_returns_to_float32_as_little_as_helps(exporting, capsys, enough):
    """The cheapest blocks first, for 3, 6, 12 … up to 48 % of the cost; then the export is refused."""
    problems, tried, published = exporting("int8", (), enough)
    # 0.02 within 3 %, 0.05 within 6 %, 0.15 within 24 %, 0.45 within 48 %
    counts = {1: [1], 2: [1, 2], 4: [1, 2, 3, 4], 99: [1, 2, 3, 4]}[enough]
    assert tried == [("a", "b", "c", "d")[:count] for count in counts]
    assert bool(problems) == (enough == 99) and len(published) == (enough != 99)
    assert ("2 of 5 blocks not quantized" in capsys.readouterr().err) == (enough > 1)


def test_other_precisions_are_tried_once(exporting):
    """With the blocks that their trace kept in float32, which the manifest names, however the check ends."""
    problems, tried, published = exporting("mixed", ("c",), 2, allow_drift=True)
    assert not problems and tried == [()] and published[0].fp32_blocks == ("c",)


@pytest.mark.parametrize("component", sorted(COMPONENTS))
def test_costs_are_shares_of_the_products(probes, component):
    """Linear layers and convolutions; all layers of the text model cost the same, and what is in no block nothing."""
    graph = probes.reference.session(component).graph
    shares = block_costs(graph)
    assert sorted(shares) == sorted(graph.blocks) and list(shares.values()) == sorted(shares.values())
    assert all(0 <= share <= 1 for share in shares.values()) and 0.3 < sum(shares.values()) < 2
    assert not any(module._forward_hooks for module in graph.modules())
    if component == "text_encoder":  # all layers alike, and nothing else
        assert list(shares.values()) == pytest.approx([1 / len(graph.blocks)] * len(graph.blocks))


def test_a_block_costs_its_products_or_its_weights():
    """The larger share: a layer on many rows costs time, a wide one on few rows memory."""

    class Uneven(Toy):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 64)])
            self.inputs, self.blocks = (graphs.Port("x", "float32", (9, 4)),), ("layers.0", "layers.1")

        def forward(self, x):
            return self.layers[1](self.layers[0](x)[:, :1])

    # weights 16 and 256; products 9 x 16 and 1 x 256
    assert block_costs(Uneven()) == pytest.approx({"layers.0": 144 / 400, "layers.1": 256 / 272})


def test_exclusion_candidates_are_tried_once_each():
    """3, 6, 12, 24 and 48 %; what an allowance adds nothing to is not tried again."""
    shares = {"a": 0.02, "b": 0.03, "c": 0.3, "d": 0.65}
    assert exclusion_candidates(shares) == [("a",), ("a", "b"), ("a", "b", "c")]
    assert exclusion_candidates({"a": 0.6, "b": 0.7}) == [()]


def test_cheapest_blocks_within_an_allowance():
    shares = {"a": 0.1, "b": 0.2, "c": 0.7}
    assert cheapest_blocks(shares, 0.05) == () and cheapest_blocks(shares, 0.15) == ("a",)
    assert cheapest_blocks(shares, 0.31) == ("a", "b") and cheapest_blocks({}, 1) == ()


def test_calibrated_int8_quantizes_products_with_weights_alone(tmp_path):
    """Q/DQ stand before them, as TensorRT wants it: not behind them, and not around attention's products."""
    command = ["--components", "encoder", "--no-captions", "--allow-drift"]
    assert export(tmp_path, "int8-static", *command) == 0
    body = onnx_library.load(tmp_path / "encoder.onnx").graph
    weights = {constant.name for constant in body.initializer}
    made_by = {output: node for node in body.node for output in node.output}
    reader = {name: node for node in body.node for name in node.input}
    products = [node for node in body.node if node.op_type == "MatMul"]
    quantized = [n for n in products if all(made_by[i].op_type == "DequantizeLinear" for i in n.input if i in made_by)]
    assert len(quantized) > 10
    assert all(made_by[n.input[1]].input[0] in weights for n in quantized), "a product of two activations"
    assert all(reader[n.output[0]].op_type != "QuantizeLinear" for n in quantized), "rounded where nothing asks for it"


def test_ranges_are_calibrated_on_the_photos_given(tmp_path, capsys):
    """Other photos are another artifact; one that is checked on is not one to calibrate on."""
    photos = [str(path) for path in sorted(Path("assets/samples").glob("*.png"))[:3]]
    one, other = ("--calibrate", *photos[:2]), ("--calibrate", photos[2])
    command = ["--components", "vae_encoder", "--allow-drift"]
    assert export(tmp_path, "int8-static", *command, *one) == 0
    first = Manifest.open(tmp_path).checked("vae_encoder")
    assert " ".join(one) in first.command and len(first.calibration) == 64
    assert export(tmp_path, "int8-static", *command, *one) == 0 and "up to date" in capsys.readouterr().err
    assert export(tmp_path, "int8-static", *command, *other) == 0
    assert Manifest.open(tmp_path).checked("vae_encoder").graph != first.graph
    capsys.readouterr()
    assert export(tmp_path, "int8", *command, *one) == 2
    assert "int8 has no ranges: add --precision int8-static or int8-trt or fp8" in capsys.readouterr().err
    assert export(tmp_path, "int8-static", *command, *one, "--images", photos[0]) == 2
    assert "also among --images" in capsys.readouterr().err


def test_one_picture_at_a_time_is_the_same_as_all(checkpoint, probes):
    """Each picture's rows, conditional and unconditional, with what is not batched beside them."""
    few = VerificationInputs(checkpoint, 4)
    for component in ("encoder", "unet"):
        session, whole = probes.reference.session(component), few.inputs(component)
        parts = list(few.single(component))
        assert len(parts) == 4 * len(whole)
        rows = len(next(iter(whole[0].values()))) // 4
        with torch.inference_mode():
            expected, found = session(**whole[0]), [session(**part) for part in parts[:4]]
        for name, value in expected.items():
            rejoined = torch.stack([part[name] for part in found], 1).flatten(0, 1)
            assert rows == (2 if component == "unet" else 1)
            torch.testing.assert_close(rejoined, value, rtol=1e-4, atol=1e-4)
