"""8 bits for TensorRT: what is quantized and how exactly, that it is checked, and built for GPUs that have it."""

from __future__ import annotations

import onnx as onnx_library
import onnxruntime
import pytest
import torch

from export import graphs, trace
from export.components import Batch
from export.manifest import Manifest
from export.quantize import qdq
from export.quantize.calibration import CalibrationError
from export.quantize.int8 import ranges
from export.runtimes.base import RuntimeUnavailable
from export.runtimes.onnxruntime import OrtSession
from export.runtimes.tensorrt_library import LIBRARIES
from export.verification.captions import Agreement
from export.verification.verifier import compare
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
    """A function: precision, excluded blocks -> the graph, and its RMS error."""
    toy = scaled(Shared()).cast(torch.float16)
    traced = trace.to_onnx(toy, tmp_path / "toy.onnx", Batch(1, 1, 4), 20)
    inputs = {"x": torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(0))}
    measured = ranges(tmp_path / "toy.onnx", [inputs])
    expected = scaled(Shared())(inputs["x"]).detach()

    def make(precision: str, *excluded: str):
        made = tmp_path / f"made-{len(excluded)}"
        made.mkdir()
        qdq.quantized(traced, tmp_path, made, measured, excluded, precision)
        session = onnxruntime.InferenceSession(made / "toy.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": inputs["x"].numpy()})[0])
        return onnx_library.load(made / "toy.onnx").graph, compare(found, expected)["rms"]

    return make


@pytest.mark.parametrize("precision", sorted(qdq.FORMATS))
def test_products_of_linear_layers_take_8_bits(quantized, precision):
    """Three weights and two activations, since two layers read one tensor; blocks that stay are float16."""
    form = qdq.FORMATS[precision]
    kind = onnx_library.TensorProto.DataType.Value(form.onnx)
    graph, error = quantized(precision)
    constants = {constant.name: constant for constant in graph.initializer}
    weights = [c for c in graph.initializer if c.data_type == kind and len(c.dims) == 2]
    assert [tuple(w.dims) for w in weights] == [(64, 64)] * 3 and all(len(w.raw_data) == 64 * 64 for w in weights)
    ops = [node.op_type for node in graph.node]
    assert ops.count("QuantizeLinear") == 2 and ops.count("DequantizeLinear") == 5
    assert not [c for c in graph.initializer if len(c.dims) == 2 and c not in weights], "the old weights are gone"
    toy = scaled(Shared())
    made_by = {output: node for node in graph.node for output in node.output}
    for layer, product in zip(toy.layers, (n for n in graph.node if n.op_type == "MatMul"), strict=True):
        raw, scale, zero = made_by[product.input[1]].input
        raw = torch.frombuffer(bytearray(constants[raw].raw_data), dtype=torch.uint8).view(form.torch).float()
        scale = torch.from_numpy(onnx_library.numpy_helper.to_array(constants[scale]).copy())
        assert scale.dtype == torch.float16 and raw.abs().max() == form.max and not any(constants[zero].raw_data)
        assert scale.shape == ((64,) if precision == "int8-trt" else ())
        wanted = layer.weight.detach().T
        step = wanted.abs() / 16 + scale / 500 if precision == "fp8" else 0.51 * scale.float() + 1e-3 * wanted.abs()
        assert ((raw.view(64, 64) * scale - wanted).abs() <= step).all()
    some, less = quantized(precision, "layers.1")
    assert [n.op_type for n in some.node].count("DequantizeLinear") == 4
    none, smallest = quantized(precision, *toy.blocks)
    assert "DequantizeLinear" not in [n.op_type for n in none.node]
    assert 0.1 > error > less > 5 * smallest


def test_what_overflows_in_float16_is_told(tmp_path):
    trace.to_onnx(Shared().cast(torch.float16), tmp_path / "toy.onnx", Batch(1, 1, 4), 20)
    with pytest.raises(CalibrationError, match=r"not finite on the calibration images: .* overflow in float16"):
        ranges(tmp_path / "toy.onnx", [{"x": torch.full((1, 9, 64), 1e5)}])


def test_it_is_exported_with_its_captions_and_its_ranges(tmp_path, few_scenes):
    """Cheap blocks stay in float16, attention and convolutions too; the check is every other precision's."""
    # whether three bits carry a small model's captions is the checkpoint's matter
    assert export(tmp_path, "fp8", "--components", "encoder", "--allow-drift") == 0
    artifact = Manifest.open(tmp_path).checked("encoder")
    figures = artifact.verification
    assert Agreement(**figures["captions"]).passes(0.99) == (not figures["problems"])
    assert (
        0.01 < figures["outputs"]["prompts"]["rms"] < 0.1
        and artifact.excluded_blocks
        and len(artifact.calibration) == 64
    )
    graph = onnx_library.load(tmp_path / artifact.main_file).graph
    made_by = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    eight = [n for n in products if [made_by[i].op_type for i in n.input if i in made_by] == ["DequantizeLinear"] * 2]
    assert len(eight) > 10 and len(products) > len(eight)
    assert not [n for n in graph.node if n.op_type == "Conv" and made_by[n.input[0]].op_type == "DequantizeLinear"]
    session = OrtSession.on_cpu(artifact, tmp_path)
    assert session.outputs[0].dtype == "float32"


def test_engines_are_built_for_gpus_that_have_it(tmp_path, capsys):
    """Floats from Ada on, integers before; what cannot be is told before anything is exported."""
    try:
        LIBRARIES["rtx"].load()
    except RuntimeUnavailable as missing:
        pytest.skip(str(missing))
    command = ["--components", "text_encoder", "--no-captions", "--precision"]
    assert build(tmp_path, *command, "fp8", "--target", "sm86") == 2
    assert "sm86 has no 8-bit floats" in capsys.readouterr().err
    assert build(tmp_path, *command, "int8-static", "--target", "sm86") == 2
    assert "int8-static is for ONNX Runtime: TensorRT's is int8-trt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for precision, target in (("fp8", "sm89"), ("int8-trt", "sm86")):
        assert build(tmp_path, *command, precision, "--target", target) == 0
        engine = Manifest.open(tmp_path).checked("text_encoder", "rtx", target)
        assert engine.precision == precision and f"--precision {precision}" in engine.command
