"""FP8: what is quantized and how exactly, that it is checked like any precision, and built for GPUs that have it."""

from __future__ import annotations

import numpy as np
import onnx as onnx_library
import pytest
import torch

from export import graphs, trace
from export.components import Batch
from export.engine import RuntimeMissing
from export.engine_ort import OrtSession
from export.fp8 import to_fp8
from export.manifest import Manifest
from export.quantize import NotPossible, ranges
from export.tensorrt_library import LIBRARIES
from export.verifier import compare
from tests.export.test_trt import build
from tests.export.toy import Toy, export, scaled


class Shared(Toy):
    """Its first two layers read the same tensor, as the projections of an attention do."""

    def __init__(self):
        super().__init__()
        self.inputs = (graphs.Port("x", "float32", (9, 64)),)

    def forward(self, x):
        x = x.to(self.dtype)
        return self.layers[2](self.layers[0](x) + self.layers[1](x)).float()


@pytest.fixture
def quantized(tmp_path):
    """A function: exact blocks -> the graph, and its RMS error."""
    toy = scaled(Shared()).cast(torch.float16)
    traced = trace.to_onnx(toy, tmp_path / "toy.onnx", Batch(1, 1, 4), 20)
    inputs = {"x": torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(0))}
    seen = ranges(tmp_path / "toy.onnx", [inputs])
    expected = scaled(Shared())(inputs["x"]).detach()

    def make(*exact: str):
        made = tmp_path / f"made-{len(exact)}"
        made.mkdir()
        to_fp8(traced, tmp_path, made, seen, exact)
        import onnxruntime

        session = onnxruntime.InferenceSession(made / "toy.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": inputs["x"].numpy()})[0])
        return onnx_library.load(made / "toy.onnx").graph, compare(found, expected)["rms"]

    return make


def test_products_of_linear_layers_are_fp8(quantized):
    """Three weights and two activations, since two layers read one tensor; blocks that stay are float16."""
    graph, error = quantized()
    constants = {constant.name: constant for constant in graph.initializer}
    weights = [c for c in graph.initializer if c.data_type == onnx_library.TensorProto.FLOAT8E4M3FN and c.dims]
    assert [tuple(w.dims) for w in weights] == [(64, 64)] * 3 and all(len(w.raw_data) == 64 * 64 for w in weights)
    ops = [node.op_type for node in graph.node]
    assert ops.count("QuantizeLinear") == 2 and ops.count("DequantizeLinear") == 5
    assert not [c for c in graph.initializer if len(c.dims) == 2 and c not in weights], "the old weights are gone"
    toy = scaled(Shared())
    made_by = {output: node for node in graph.node for output in node.output}
    for layer, product in zip(toy.layers, (n for n in graph.node if n.op_type == "MatMul"), strict=True):
        raw, scale, _ = made_by[product.input[1]].input
        raw = torch.frombuffer(bytearray(constants[raw].raw_data), dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = onnx_library.numpy_helper.to_array(constants[scale])
        assert scale.dtype == np.float16 and raw.float().abs().max() == 448
        wanted = layer.weight.detach().T
        assert ((raw.float().view(64, 64) * scale.item() - wanted).abs() <= wanted.abs() / 16 + scale / 500).all()
    some, less = quantized("layers.1")
    assert [n.op_type for n in some.node].count("DequantizeLinear") == 4
    none, least = quantized(*toy.blocks)
    assert "DequantizeLinear" not in [n.op_type for n in none.node]
    assert 0.1 > error > less > 10 * least


def test_what_overflows_in_float16_is_told(tmp_path):
    traced = trace.to_onnx(Shared().cast(torch.float16), tmp_path / "toy.onnx", Batch(1, 1, 4), 20)
    seen = ranges(tmp_path / "toy.onnx", [{"x": torch.full((1, 9, 64), 1e5)}])
    (tmp_path / "made").mkdir()
    with pytest.raises(NotPossible, match="overflows in float16, which the rest computes in: choose int8-static"):
        to_fp8(traced, tmp_path, tmp_path / "made", seen)


def test_it_is_exported_with_its_captions_and_its_ranges(tmp_path, capsys):
    """Cheap blocks stay in float16, attention and convolutions too; the check is every other precision's."""
    # whether three bits carry a small model's captions is the checkpoint's matter
    assert export(tmp_path, "fp8", "--components", "encoder", "--allow-drift") == 0
    artifact = Manifest.open(tmp_path).checked("encoder")
    figures = artifact.verification
    assert (figures["captions"]["agreement"] >= 0.99) == (not figures["problems"])
    assert 0.01 < figures["outputs"]["prompts"]["rms"] < 0.1 and artifact.exact and len(artifact.calibration) == 64
    graph = onnx_library.load(tmp_path / artifact.main_file).graph
    made_by = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    eight = [n for n in products if [made_by[i].op_type for i in n.input if i in made_by] == ["DequantizeLinear"] * 2]
    assert len(eight) > 10 and len(products) > len(eight)
    assert not [n for n in graph.node if n.op_type == "Conv" and made_by[n.input[0]].op_type == "DequantizeLinear"]
    session = OrtSession.on_cpu(artifact, tmp_path)
    assert session.outputs[0].dtype == "float32"


def test_engines_are_built_for_gpus_that_have_it(tmp_path, capsys):
    """From Ada on; for older ones the command says so before it exports anything."""
    try:
        LIBRARIES["rtx"].load()
    except RuntimeMissing as missing:
        pytest.skip(str(missing))
    command = ["--components", "text_encoder", "--precision", "fp8", "--no-captions", "--target"]
    assert build(tmp_path, *command, "sm86") == 2
    assert "sm86 has no 8-bit floats" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert build(tmp_path, *command, "sm89") == 0
    engine = Manifest.open(tmp_path).checked("text_encoder", "rtx", "sm89")
    assert engine.precision == "fp8" and "--precision fp8" in engine.command
