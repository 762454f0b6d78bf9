"""Precisions: what they cost, how drift is told and located, and that it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import onnx as onnx_library
import onnxruntime
import pytest
import torch

from export import blocks, graphs, onnx, quantize, trace
from export.components import COMPONENTS, Batch
from export.engine_ort import OrtSession
from export.exporter import Exporter
from export.manifest import Artifact, Manifest
from export.probes import Probes
from export.verifier import Verifier, compare, hopeless
from tests.export.conftest import BUNDLED, LIMITS


@pytest.fixture(scope="module")
def probes(checkpoint) -> Probes:
    return Probes(checkpoint, 6)


def export(out, precision: str, *args: str) -> int:
    command = ["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS, "--precision", precision, "--probes", "6"]
    return onnx.main([*command, *args])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_encoder_with_its_error_and_its_captions(tmp_path, precision):
    """More than float32's error, less than the precision explains; kept exactly where the captions hold."""
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
    assert captions["images"] == 4 and captions["tokens"] > 40  # the noise is not captioned
    assert (captions["agreement"] >= 0.99) == (code == 0) == (not figures["problems"])
    ops = {node.op_type for node in onnx_library.load(tmp_path / artifact.main_file).graph.node}
    assert ("MatMulInteger" in ops) == (precision == "int8")


@pytest.mark.parametrize("precision", ["bf16", "mixed", "int8-static"])
def test_small_component_in_every_precision(tmp_path, precision):
    assert export(tmp_path, precision, "--components", "text_encoder", "--no-captions") == 0
    artifact = Manifest.open(tmp_path).checked("text_encoder")
    assert artifact.precision == precision and not artifact.verification["problems"]
    assert artifact.opset == (22 if precision == "bf16" else 20)


class Toy(graphs.Graph):
    """Three linear blocks; the middle one overflows in half precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))
        self.layers[1].weight.data *= 4e5
        self.layers[2].weight.data /= 4e5
        self.inputs, self.outputs = (graphs.Port("x", "float32", (64,)),), ("y",)
        self.blocks = ("layers.0", "layers.1", "layers.2")

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x.to(self.dtype) if i == 0 else x)
        return x.float()


def test_mixed_keeps_as_few_blocks_as_it_needs():
    """What overflows inside a block is found; what overflows between blocks, no choice of blocks can help."""
    inputs = {"x": torch.randn(16, 64)}
    errors = quantize.own_errors(Toy(), Toy(), inputs)
    assert errors["layers.1"] == float("inf") and errors["layers.0"] < 1e-3
    with pytest.raises(quantize.NotPossible, match="use fp32 or bf16"):
        quantize.prepare(Toy(), Toy, "mixed", [inputs])
    small = lambda: _scaled(Toy())  # noqa: E731
    graph, exact = quantize.prepare(small(), small, "mixed", [inputs])
    assert exact == ()
    with torch.inference_mode():
        assert compare(graph(inputs["x"]), small()(inputs["x"]))["rms"] < 5e-3


def _scaled(toy: Toy) -> Toy:
    toy.layers[1].weight.data /= 4e5
    toy.layers[2].weight.data *= 4e5
    return toy


def test_exact_blocks_compute_in_float32():
    toy = _scaled(Toy()).cast(torch.float16, exact=["layers.1"])
    seen = {}
    for path in toy.blocks:
        toy.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: seen.update({path: args[0].dtype})
        )
    toy(torch.randn(2, 64))
    assert [layer.weight.dtype for layer in toy.layers] == [torch.float16, torch.float32, torch.float16]
    assert seen["layers.1"] == torch.float32 and seen["layers.2"] == torch.float16


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
    report = blocks.drift(artifact, copied, graph, probes.inputs("text_encoder")[0])
    assert [b["block"] for b in report] == list(artifact.blocks)
    assert [b["drifts"] for b in report][:2] == [False, True]
    session = OrtSession.on_cpu(artifact, copied)
    problems = Verifier(checkpoint, probes, captions=False).check(artifact, session, copied)["problems"]
    assert problems[-1] == f"the first block that drifts is {second}"


def test_drift_is_refused_unless_allowed(tmp_path, capsys, monkeypatch):
    """A precision whose tolerance is (made) too small leaves no file; --allow-drift keeps it, and says so."""
    monkeypatch.setattr("export.verifier.tolerance", lambda *_: 1e-9)
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


def test_int8_leaves_exact_blocks_alone(tmp_path):
    """The products of a block that is kept are no 8-bit ones, and its error is none."""
    toy = _scaled(Toy())
    traced = trace.to_onnx(toy, tmp_path / "toy.onnx", Batch(1, 1, 4), 20)
    inputs = {"x": torch.randn(4, 64)}
    errors = []
    for exact, products in (((), 3), (("layers.1",), 2), (toy.blocks, 0)):
        made = tmp_path / str(products)
        made.mkdir()
        written = quantize.to_int8(traced, tmp_path, made, exact=exact)
        nodes = onnx_library.load(made / written.files[0]).graph.node
        assert sum(node.op_type == "MatMulInteger" for node in nodes) == products
        session = onnxruntime.InferenceSession(made / "toy.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": inputs["x"].numpy()})[0])
        errors.append(compare(found, toy(inputs["x"]).detach())["rms"])
    assert errors[0] > errors[1] > 1e-4 > errors[2]


@pytest.mark.parametrize("enough", [1, 2, 4, 99])
def test_int8_returns_to_float32_as_little_as_helps(tmp_path, monkeypatch, capsys, enough):
    """The cheapest blocks first, for 3, 6, 12 … up to 48 % of the products; then the export is refused."""
    shares = {"a": 0.02, "b": 0.03, "c": 0.1, "d": 0.3, "e": 0.55}
    tried = []

    class Stub(Exporter):
        def __init__(self):
            self.made, self.manifest, self.checkpoint = tmp_path, SimpleNamespace(sampling=True, publish=publish), None
            self.verifier = SimpleNamespace(check=check)

        def _trace(self, wanted):
            return SimpleNamespace(blocks=tuple(shares)), None, ()

        def _written(self, wanted, graph, traced, exact):
            tried.append(exact)
            return dataclasses.replace(wanted, exact=exact, files={"x": {}})

    def check(artifact, session, folder):
        return {"problems": [] if len(artifact.exact) >= enough else ["too far"]}

    published = []
    publish = lambda artifact, made: published.append(artifact)  # noqa: E731
    monkeypatch.setattr("export.exporter.quantize.costs", lambda graph: shares)
    monkeypatch.setattr("export.exporter.lint.problems", lambda *_: [])
    monkeypatch.setattr("export.exporter.OrtSession.on_cpu", lambda *_: None)
    wanted = Artifact("encoder", "onnx", "", "int8", 20, (), (), Batch(1, 1, 1), "", "", "", "", {}, "")
    problems = Stub().export(wanted, allow_drift=False)
    order = tuple(shares)
    # 0.02 within 3 %, 0.05 within 6 %, 0.15 within 24 %, 0.45 within 48 %
    counts = {1: [1], 2: [1, 2], 4: [1, 2, 3, 4], 99: [1, 2, 3, 4]}[enough]
    assert tried == [order[:count] for count in counts]
    assert bool(problems) == (enough == 99) and len(published) == (enough != 99)
    assert ("2 of 5 blocks in float32" in capsys.readouterr().err) == (enough > 1)


@pytest.mark.parametrize("component", sorted(COMPONENTS))
def test_costs_are_shares_of_the_products(probes, component):
    """Linear layers and convolutions, counted by hand for the text model; the sum leaves out what is in no block."""
    graph = probes.reference.session(component).graph
    shares = quantize.costs(graph)
    assert sorted(shares) == sorted(graph.blocks) and list(shares.values()) == sorted(shares.values())
    assert 0.3 < sum(shares.values()) <= 1 + 1e-9
    assert not any(module._forward_hooks for module in graph.modules())
    if component == "text_encoder":  # all layers alike, and nothing else
        assert list(shares.values()) == pytest.approx([1 / len(graph.blocks)] * len(graph.blocks))


def test_cheapest_blocks_within_an_allowance():
    shares = {"a": 0.1, "b": 0.2, "c": 0.7}
    assert quantize.cheapest(shares, 0.05) == () and quantize.cheapest(shares, 0.15) == ("a",)
    assert quantize.cheapest(shares, 0.31) == ("a", "b") and quantize.cheapest({}, 1) == ()


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
    command = ["--components", "encoder", "--no-captions", "--allow-drift"]
    assert export(tmp_path, "int8-static", *command, *one) == 0
    first = Manifest.open(tmp_path).checked("encoder")
    assert " ".join(one) in first.command and len(first.calibration) == 64
    assert export(tmp_path, "int8-static", *command, *one) == 0 and "up to date" in capsys.readouterr().err
    assert export(tmp_path, "int8-static", *command, *other) == 0
    assert Manifest.open(tmp_path).checked("encoder").graph != first.graph
    capsys.readouterr()
    assert export(tmp_path, "int8", *command, *one) == 2
    assert "int8 has no ranges to calibrate: add --precision int8-static" in capsys.readouterr().err
    assert export(tmp_path, "int8-static", *command, *one, "--images", photos[0]) == 2
    assert "also among --images" in capsys.readouterr().err


def test_one_picture_at_a_time_is_the_same_as_all(checkpoint, probes):
    """Each picture's rows, conditional and unconditional, with what is not batched beside them."""
    few = Probes(checkpoint, 4)
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
