"""Graphs with plugin nodes: their plain twin, what TensorRT builds from, and its own Python code for such plugins."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from export import graphs, plugins, trace
from export.builders.tensorrt import wants_plugins
from export.components import COMPONENTS, PEAK, Batch, Port, tolerance
from export.manifest import ArtifactError, Manifest, kernels_hash
from export.runtimes.base import RuntimeUnavailable
from export.runtimes.tensorrt import pad_batch
from kernels.attention import attention
from kernels.cross_attention import cross_attention
from kernels.tensorrt.onnx_nodes import OPERATIONS
from kernels.upsample_normalize import bicubic_matrix, upsample_normalize
from vlv.model.config import DaViTConfig
from vlv.model.davit import DaViT

pytest.importorskip("triton", reason="plugins are built by Triton: pip install triton")
BATCH, PROFILE = 8, Batch(1, 4, 8)


class Toy(graphs.Graph):
    """All operations in a row, on a tower of one stage."""

    inputs = (Port("image", "float32", (9, 8, 3)), Port("pixels", "uint8", (3, 4, 4)))
    outputs = ("found",)
    blocks = ("tower.stages.0", "norm")
    constants = ("resize", "mean", "std")

    def __init__(self):
        super().__init__()
        self.tower = DaViT(DaViTConfig((32,), (1,), (2,), (1,), (3,), (2,), (1,), (False,), 4))
        self.norm = torch.nn.LayerNorm(32)
        for name, value in zip(self.constants, (bicubic_matrix(4, 8), torch.rand(3), torch.rand(3) + 1), strict=True):
            self.register_buffer(name, value)

    def forward(self, image: Tensor, pixels: Tensor) -> Tensor:
        large = upsample_normalize(pixels, self.resize, self.mean, self.std, self.dtype)
        x = self.tower(torch.cat([image.to(self.dtype), large], 1))
        heads = self.norm(x).flatten(1, 2).unflatten(-1, (2, 16))
        heads = cross_attention(heads, heads[:, :7], heads[:, :7]).transpose(1, 2)
        return attention(heads, heads, heads, True).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def twins(toy, tmp_path_factory) -> dict[str, Path]:
    """The same module as a plain graph and as one with nodes of ours."""
    folder = tmp_path_factory.mktemp("twins")
    for kind in ("plain", "nodes"):
        trace.to_onnx(toy, folder / f"{kind}.onnx", PROFILE, 20, plugins.add_bodies if kind == "nodes" else None)
    return {kind: folder / f"{kind}.onnx" for kind in ("plain", "nodes")}


@pytest.fixture(scope="module")
def built(twins):
    """What TensorRT is to build from, and the plugins."""
    import onnx_ir

    model = onnx_ir.load(twins["nodes"])
    return model, plugins.kernel_graph(model, BATCH, 80)


def operations(file: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(file).graph.node if node.domain == "vlv"]


def test_onnx_runtime_runs_the_nodes_as_their_plain_twin(toy, twins):
    import onnxruntime

    assert {name.rpartition("_")[0] for name in operations(twins["nodes"])} == set(OPERATIONS)
    assert not operations(twins["plain"])
    sessions = [onnxruntime.InferenceSession(file) for file in twins.values()]
    for batch in (1, 3):
        inputs = dict(zip(("image", "pixels"), toy.example(batch, torch.Generator().manual_seed(batch)), strict=True))
        feed = {name: value.numpy() for name, value in inputs.items()}
        plain, nodes = (session.run(None, feed)[0] for session in sessions)
        with torch.no_grad():
            exact = toy(**inputs).numpy()
        allowed = PEAK * tolerance("fp32", len(toy.blocks), toy.longest_sum) * np.abs(exact).max()
        assert np.abs(plain - exact).max() <= allowed and np.abs(nodes - exact).max() <= allowed


def test_a_node_a_kernel_is_left(twins, built):
    """Channel attention becomes two, all others one; nothing is left without its source."""
    model, made = built
    nodes = [node for node in model.graph if node.domain == "vlv"]
    before = operations(twins["nodes"])
    assert len(nodes) == len(before) + sum(name.startswith("channel_attention") for name in before)
    assert not model.functions and {node.op_type for node in nodes} == set(made)
    assert [tuple(value.shape) for value in model.graph.inputs] == [(BATCH, 9, 8, 3), (BATCH, 3, 4, 4)]
    for node in nodes:
        kernel = made[node.op_type]
        assert {name: a.value for name, a in node.attributes.items()} == {
            "plugin_namespace": "vlv", "plugin_version": "1", "aot": 1
        }  # fmt: skip
        assert (len(node.inputs), len(node.outputs)) == (len(kernel.inputs), len(kernel.outputs))
        parameters = re.search(rf"\.entry {kernel.name}\(([^)]*)\)", kernel.ptx)[1]
        assert parameters.count(".param") == len(node.inputs) + len(node.outputs)
    known = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        assert {value.name for value in node.inputs if value} <= known, node.name
        known |= {value.name for value in node.outputs}
    assert {value.name for value in model.graph.outputs} == {"found"} <= known


ENCODER = {"upsample_normalize", "window_attention", "channel_attention", "dwconv_norm", "attention"}
UNET = {"attention", "cross_attention"}


@pytest.mark.parametrize(("name", "expected"), [("encoder", ENCODER), ("unet", UNET)])
def test_a_component_of_a_checkpoint(artifacts, checkpoint, tmp_path, name, expected):
    """Everything that we have a kernel for is one of ours: no plain attention is left."""
    import onnx

    graph = Manifest.open(artifacts).checked(name)
    file, made = plugins.make(checkpoint, graph, tmp_path, artifacts / graph.main_file, "sm90")
    assert set(operations(file)) == set(made) and all("sm_90a" in kernel.ptx for kernel in made.values())
    assert {kernel.kernel.split(".")[0] for kernel in made.values()} == expected
    plain = {node.op_type for node in onnx.load(file).graph.node if node.domain != "vlv"}
    assert "Softmax" not in plain


@pytest.mark.parametrize("name", ["context_kv", "vae_decoder"])
def test_a_component_with_nothing_to_fuse(artifacts, checkpoint, tmp_path, name):
    graph = Manifest.open(artifacts).checked(name)
    assert plugins.make(checkpoint, graph, tmp_path, artifacts / graph.main_file, "sm90") is None


def test_nodes_off_their_plain_twin_are_refused(artifacts, checkpoint, monkeypatch):
    graph = Manifest.open(artifacts).checked("text_encoder")
    monkeypatch.setattr(plugins, "tolerance", lambda *_: -1.0)
    with pytest.raises(ArtifactError, match="differs from its plain graph in context"):
        plugins._require_equal(checkpoint, graph, 1, *[artifacts / graph.main_file] * 2)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_components_that_call_our_operations(checkpoint, name):
    """Their graphs hang on the code of kernels/, so the manifest keeps its hash."""
    graph = graphs.load(checkpoint, name)
    called = set()
    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_filename))
    try:
        with torch.no_grad():
            graph(*graph.example(1))
    finally:
        sys.setprofile(None)
    ours = any(Path(file).parent == Path(kernels.__file__).parent for file in called)
    assert ours == COMPONENTS[name].ops == bool(kernels_hash(name))


def test_shapes_that_are_not_known_are_refused():
    import onnx_ir

    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["batch", "n", 4]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    with pytest.raises(ValueError, match="shape of x is not known"):
        plugins.Signature.of(onnx_ir.node("attention", [x], domain="vlv", name="node"))


@pytest.mark.parametrize(
    "asked, runtime, precision, expected, said",
    [
        ("auto", "trt", "fp16", True, ""), ("auto", "trt", "fp32", False, ""), ("auto", "rtx", "fp16", False, ""),
        ("on", "trt", "fp32", True, ""), ("off", "trt", "fp16", False, ""),
        ("on", "rtx", "fp16", False, "TensorRT-RTX has no plugins"), ("on", "trt", "int8", False, "the plain graph"),
    ],
)  # fmt: skip
def test_when_an_engine_gets_our_kernels(asked, runtime, precision, expected, said, capsys):
    assert wants_plugins(asked, runtime, precision) is expected
    assert said in capsys.readouterr().err


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not wants_plugins("auto", "trt", "fp16")
    with pytest.raises(RuntimeUnavailable, match="pip install triton"):
        wants_plugins("on", "trt", "fp16")


def test_smaller_batches_arepad_batch():
    x = torch.arange(6).view(3, 2)
    assert torch.equal(pad_batch(x, 5), x[[0, 1, 2, 2, 2]])


class _Kind(type):
    """A class whose unknown members come into being when asked for: what is only compared or inherited from."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = f"{cls.__name__}.{name}" if name.isupper() else _Kind(name, (), {})
        setattr(cls, name, value)
        return value


class _Expression(metaclass=_Kind):
    """TensorRT's symbolic size, here always a known one."""

    def __init__(self, value: int):
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


@pytest.fixture
def trt(monkeypatch):
    """TensorRT's own `tensorrt.plugin`, over a stand-in for the library's part in C++."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None:
        pytest.skip("TensorRT's Python source is not here: pip install --no-deps tensorrt-cu13-bindings")

    class Library(ModuleType):
        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            setattr(self, name, _Kind(name, (), {}))
            return getattr(self, name)

    library, creators = Library("tensorrt"), {}
    library.Logger = type("Logger", (), {"WARNING": 1, "log": lambda *_: None})
    library.IDimensionExpr = _Expression
    library.Dims = SimpleNamespace(MAX_DIMS=8)
    library.DimsExprs = lambda length: [None] * length
    library.PluginFieldCollection = list
    library.get_plugin_registry = lambda: SimpleNamespace(
        register_creator=lambda creator, namespace: creators.setdefault((creator.name, namespace), creator),
        get_creator=lambda name, version, namespace: creators.get((name, namespace)),
    )
    library.__path__ = [str(Path(spec.origin).parent)]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    yield library
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        monkeypatch.delitem(sys.modules, name)


def test_tensorrt_takes_the_plugins(trt, built):
    """Each is registered, created as an AOT plugin, and asked what the builder asks: types, shapes, launch, code."""
    model, made = built
    plugins.register(trt, made)
    plugins.register(trt, made)  # a second component may have the same kernel
    from tensorrt.plugin import _lib

    kinds = {torch.float32: trt.DataType.FLOAT}
    maker = SimpleNamespace(constant=_Expression)
    for node in (node for node in model.graph if node.domain == "vlv"):
        kernel, name = made[node.op_type], f"vlv::{node.op_type}"
        creator = _lib._TemplatePluginCreator(node.op_type, "vlv", {})
        plugin = creator.create_plugin(node.op_type, "vlv", [], None, trt.QuickPluginCreationRequest.STRICT_AOT)
        shapes = [[_Expression(n if isinstance(n, int) else BATCH) for n in value.shape] for value in node.inputs]
        types = plugin.get_output_data_types([trt.DataType.FLOAT] * len(shapes), [len(shape) for shape in shapes])
        assert types == [kinds[x.dtype] for x in kernel.written] and len(types) == _lib.QDP_REGISTRY[name].num_outputs
        outputs = plugin.get_output_shapes(shapes, [], maker)
        assert [tuple(size.value for size in shape) for shape in outputs] == [tuple(x.shape) for x in kernel.written]
        plugin.set_tactic(0)
        tensors = [
            SimpleNamespace(desc=SimpleNamespace(type=0, format=0, scale=1), dims=s) for s in (*shapes, *outputs)
        ]
        params, extra = SimpleNamespace(), SimpleNamespace()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tensorrt.plugin._plugin_class.Shape", lambda desc: None)
            plugin.get_launch_params(shapes, tensors, len(shapes), params, extra, maker)
        grid, block = ([getattr(params, f"{kind}_{axis}").expr.value for axis in "xyz"] for kind in ("grid", "block"))
        assert (tuple(grid), tuple(block)) == (kernel.grid, kernel.block) and extra.nbSymExprs == 0
        assert params.shared_mem.expr.value == kernel.shared
        descriptions = [SimpleNamespace(type=0, format=0)] * len(tensors)
        assert plugin.get_kernel(descriptions[: len(shapes)], descriptions[len(shapes) :]) == (
            kernel.name, kernel.ptx.encode()
        )  # fmt: skip
