"""The linter's complaints, each provoked by a graph that has the fault."""

from __future__ import annotations

import time

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export import lint
from export.manifest import Manifest
from export.verification import graph_lint


def graph(tmp_path, nodes, inputs, outputs, initializers=(), imports=(("", 20),)):
    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(nodes, "g", [value(*i) for i in inputs], [value(*o) for o in outputs], initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid(*i) for i in imports])
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


FLOAT = ("x", TensorProto.FLOAT, ["batch", 4]), ("y", TensorProto.FLOAT, ["batch", 4])


def test_exports_pass_in_seconds(artifacts):
    manifest, start = Manifest.open(artifacts), time.monotonic()
    for artifact in manifest.artifacts.values():
        if artifact.runtime == "onnx":
            for runtime in ("onnx", "rtx", "trt"):
                assert graph_lint.problems(artifacts / artifact.main_file, artifact, runtime) == []
    assert time.monotonic() - start < 20


def test_operators(tmp_path):
    file = graph(
        tmp_path, [helper.make_node("Magic", ["x"], ["y"], "n", domain="ours")], FLOAT[:1], FLOAT[1:], (),
        (("", 20), ("ours", 1)),
    )  # fmt: skip
    assert graph_lint.problems(file) == ["operator ours::Magic (node n) is not supported by onnx"]
    file = graph(
        tmp_path, [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], "n")], FLOAT[:1], FLOAT[1:]
    )
    assert not graph_lint.problems(file) and "DynamicQuantizeLinear" in graph_lint.problems(file, runtime="rtx")[0]


def test_integers_of_64_bits(tmp_path):
    wide = ("i", TensorProto.INT64, ["batch", 4])
    file = graph(
        tmp_path, [helper.make_node("Identity", ["i"], ["y"])], [wide], [("y", TensorProto.INT64, ["batch", 4])]
    )
    assert graph_lint.problems(file)[0].startswith("i is int64: inputs and outputs must be uint8, int32, float32")
    nodes = [
        helper.make_node("Cast", ["x"], ["w"], "c", to=TensorProto.INT64),
        helper.make_node("Abs", ["w"], ["v"], "leak"),
        helper.make_node("Cast", ["v"], ["y"], to=TensorProto.FLOAT),
    ]
    assert graph_lint.problems(graph(tmp_path, nodes, FLOAT[:1], FLOAT[1:])) == [
        "node leak (Abs) computes on 64-bit integers: cast to int32 before it"
    ]


def test_shapes_outside_the_profile(artifacts, tmp_path):
    artifact = Manifest.open(artifacts).artifacts["context_kv"]
    name = artifact.inputs[0].name
    fixed = (name, TensorProto.FLOAT, [3, *artifact.inputs[0].shape])
    file = graph(tmp_path, [helper.make_node("Identity", [name], ["y"])], [fixed], FLOAT[1:])
    assert f"{name} has a fixed batch of 3" in graph_lint.problems(file, artifact)[0]
    other = (name, TensorProto.FLOAT, ["batch", 7, 7])
    file = graph(tmp_path, [helper.make_node("Identity", [name], ["y"])], [other], FLOAT[1:])
    assert "outside the profile's" in graph_lint.problems(file, artifact)[0]


class ScatterMean(torch.nn.Module):
    def forward(self, x):
        index = (x > 0).int().long()
        return torch.zeros(x.shape[0], 4).scatter_reduce(1, index, x, "mean", include_self=False)


class LogSigmoid(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.logsigmoid(x)


class Log1p(torch.nn.Module):
    def forward(self, x):
        return torch.log1p(x.abs())


class Expm1(torch.nn.Module):
    def forward(self, x):
        return torch.expm1(x)


class LogCumSumExp(torch.nn.Module):
    def forward(self, x):
        return torch.logcumsumexp(x, 1)


class Upsampled(torch.nn.Module):
    """Pillow's bicubic upsampling, by PyTorch."""

    def forward(self, x):
        return torch.nn.functional.interpolate(x[:, None], (16, 16), mode="bicubic", antialias=True)


class MaskedSoftmax(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(x.masked_fill(x > 1, float("-inf")), -1)


class MaskedAttention(torch.nn.Module):
    def forward(self, x):
        x = x[:, None, :, None].expand(-1, 2, -1, 4)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=x[..., :1] @ x[..., :1].mT > 0)


class CausalAttention(torch.nn.Module):
    def forward(self, x):
        x = x[:, None, :, None].expand(-1, 2, -1, 4)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("module", "opset", "problem"),
    [
        (ScatterMean, 20, "keeps the last value where indices repeat"),
        (LogSigmoid, 20, "is -inf for large negative inputs"),
        (Log1p, 20, "(Log) of 1 + x, as log1p is exported, loses x below 1e-7"),
        (Expm1, 20, "(Sub) of exp(x) - 1, as expm1 is exported, loses x below 1e-7"),
        (LogCumSumExp, 20, "(Log) of a running sum of exponentials, as logcumsumexp is exported"),
        (MaskedSoftmax, 20, "masked entirely gives zeros or the mean"),
        (MaskedAttention, 20, "masked entirely gives zeros or the mean"),
        (MaskedAttention, 23, "masked entirely gives zeros or the mean"),
        (CausalAttention, 20, None),
    ],
)
def test_what_is_exported_inexactly(tmp_path, module, opset, problem):
    """The exporter's own graphs of a user's changed module."""
    program = torch.onnx.export(module().eval(), (torch.randn(3, 8),), dynamo=True, opset_version=opset, verbose=False)
    program.save(tmp_path / "x.onnx")
    found = [one for one in graph_lint.problems(tmp_path / "x.onnx") if "not supported" not in one and "64" not in one]
    assert bool(found) == bool(problem) and all(problem in one for one in found)


def exported(module, *shape) -> onnx.ModelProto:
    module = module().eval()
    return torch.onnx.export(module, (torch.randn(shape),), dynamo=True, opset_version=20, verbose=False).model_proto


def in_onnxruntime(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    ("module", "row"),
    [
        (LogSigmoid, [-200.0] * 8),
        (Log1p, [1e-10] * 8),
        (Expm1, [1e-10] * 8),
        (LogCumSumExp, [-200.0, *[0.0] * 7]),
    ],
)
def test_what_the_lint_names_is_wrong_there(module, row):
    x = torch.tensor([row] * 3)
    assert not torch.allclose(in_onnxruntime(exported(module, 3, 8), x), module()(x), rtol=1e-2, atol=0)


class OurExpm1(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x / 2) * (torch.exp(x) + 1)


class OurLogSigmoid(torch.nn.Module):
    def forward(self, x):
        return -torch.nn.functional.softplus(-x)


@pytest.mark.parametrize(("module", "advised"), [(Expm1, OurExpm1), (LogSigmoid, OurLogSigmoid)])
def test_what_the_lint_advises_is_exact_there(tmp_path, module, advised):
    model = exported(advised, 3, 8)
    onnx.save(model, tmp_path / "x.onnx")
    assert not graph_lint.problems(tmp_path / "x.onnx", runtime="rtx")
    x = torch.tensor([-80.0, -1.0, -1e-3, -1e-10, 1e-10, 1e-3, 20.0, 80.0]).expand(3, 8)
    torch.testing.assert_close(in_onnxruntime(model, x), module()(x), rtol=1e-5, atol=1e-37)


def test_resize_beyond_the_border(tmp_path):
    """A graph whose antialiased Resize takes pixels beyond the border: named, and off there only."""
    model = exported(Upsampled, 3, 8, 8)
    onnx.save(model, tmp_path / "x.onnx")
    assert not [one for one in graph_lint.problems(tmp_path / "x.onnx") if "exclude_outside" in one]
    x = torch.rand(3, 8, 8)
    expected = Upsampled()(x)
    torch.testing.assert_close(in_onnxruntime(model, x), expected)

    (resize,) = [node for node in model.graph.node if node.op_type == "Resize"]
    next(a for a in resize.attribute if a.name == "exclude_outside").i = 0
    onnx.save(model, tmp_path / "x.onnx")
    (found,) = [one for one in graph_lint.problems(tmp_path / "x.onnx") if "exclude_outside" in one]
    assert found.startswith(f"node {resize.name} (Resize) with antialias=1 and exclude_outside=0 weighs pixels beyond")
    error = (in_onnxruntime(model, x) - expected).abs()
    assert error[..., 4:-4, 4:-4].max() < 1e-5 and error[..., 0, :].max() > 1 / 255


def test_memory(artifacts, monkeypatch):
    monkeypatch.setattr(graph_lint, "_available", lambda: 1000)
    assert (
        "of memory and 0.0 GB are free: build elsewhere"
        in graph_lint.problems(artifacts / "unet.onnx", runtime="rtx")[0]
    )
    assert not graph_lint.problems(artifacts / "unet.onnx", runtime="onnx")


def test_command(artifacts, tmp_path, capsys):
    assert lint.main([str(artifacts / "unet.onnx")]) == 0
    assert "1 graphs without problems" in capsys.readouterr().out
    for content in (b"no graph at all, and quite long", b""):
        (tmp_path / "bad.onnx").write_bytes(content)
        assert lint.main([str(tmp_path / "bad.onnx")]) == 1 and "not an ONNX graph" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lint.main([])
    assert lint.main([str(tmp_path / "absent.onnx")]) == 2
