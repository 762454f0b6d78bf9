"""float16 overflow that ONNX Runtime on a CPU does not show: found by ranges, kept in float32 or refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export import graphs, trace
from export.components import Batch
from export.graphs import load
from export.manifest import Manifest
from export.quantize import overflow
from export.verification.inputs import VerificationInputs
from export.verification.verifier import compare
from tests.export import toy
from tests.export.conftest import LIMITS
from vlv.checkpoints.folder import Checkpoint, save
from vlv.model.config import PRESETS, DaViTConfig
from vlv.model.encoder import VLVEncoder

BLOCK = "encoder.bottleneck.text.layers.1"
SMALL = replace(
    PRESETS["tiny"],
    vision=DaViTConfig((32,), (1,), (1,), (1,), (8,), (8,), (0,), (False,), 4),
    image_size=16,
    encoder_layers=1,
    decoder_layers=1,
    context_layers=2,
)


def rescale(source, target, between: float = 1.0):
    """Copy a checkpoint with another scale inside a text layer, whose product then leaves float16's range.

    between: a further scale of everything that the text layers add to the residual stream, which a norm removes.
    """
    shutil.copytree(source, target)
    file = target / "encoder.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)

    def multiply(name: str, factor: float) -> None:
        weights[name] = (weights[name].float() * factor).to(weights[name].dtype)
        assert weights[name].isfinite().all(), name

    text = "bottleneck.text"
    scale = 2.0**8 * between
    for name in ("bottleneck.projection.2.weight", "bottleneck.projection.2.bias", f"{text}.positions"):
        multiply(name, scale)
    layers = {name.split(".")[3] for name in weights if name.startswith(f"{text}.layers.")}
    for layer in layers:
        for part in ("attention.proj.weight", "attention.proj.bias", "fc2.weight", "fc2.bias"):
            multiply(f"{text}.layers.{layer}.{part}", scale)
    for part in ("fc1.weight", "fc1.bias"):
        multiply(f"{text}.layers.1.{part}", 2.0**16)
    multiply(f"{text}.layers.1.fc2.weight", 2.0**-16)
    save_file(weights, file, metadata=metadata)
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with random weights that is quickly traced: what overflows does so at any size."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    save(folder, VLVEncoder(SMALL))
    return folder


@pytest.fixture(scope="module")
def rescaled(small, tmp_path_factory):
    return rescale(small, tmp_path_factory.mktemp("rescaled") / "checkpoint")


def test_onnx_runtime_alone_would_not_see_it(rescaled):
    """The premise: finite in float32, infinite in float16, and right with that block in float32."""
    other = Checkpoint.open(rescaled)
    pixels = VerificationInputs(other, 4).images
    with torch.inference_mode():
        expected = load(other, "encoder")(pixels)[1]
        assert expected.isfinite().all()
        assert not load(other, "encoder").cast(torch.float16)(pixels)[1].isfinite().all()
        found = load(other, "encoder").cast(torch.float16, [BLOCK])(pixels)[1]
        assert found.isfinite().all() and compare(found, expected)["rms"] < 5e-3


@pytest.mark.parametrize("precision", ["fp16", "int8-trt", "fp8"])
def test_the_block_stays_in_float32(rescaled, tmp_path, capsys, precision):
    command = ["--components", "encoder", "--no-captions", "--allow-drift"]
    code = toy.onnx.main(
        ["--ckpt", str(rescaled), "--out", str(tmp_path), *LIMITS, "--precision", precision, "--probes", "4", *command]
    )
    assert code == 0 and f"because values overflow in float16: {BLOCK}" in capsys.readouterr().err
    artifact = Manifest.open(tmp_path).checked("encoder")
    assert artifact.fp32_blocks == (BLOCK,)
    model = onnx.load(tmp_path / artifact.main_file)
    kinds = {w.name: w.data_type for w in model.graph.initializer}
    wide = [n for n in model.graph.node if n.op_type == "MatMul" and kinds.get(n.input[1]) == TensorProto.FLOAT]
    assert wide, "its products are float32, and not quantized"


def edited(source, target, change):
    """Copy a checkpoint with changed weights, all of them in float32."""
    shutil.copytree(source, target)
    weights = {name: weight.float() for name, weight in load_file(target / "encoder.safetensors").items()}
    change(weights)
    save_file(weights, target / "encoder.safetensors", metadata={"format": "pt"})
    return target


def low_scores(weights) -> None:
    """All scores of a layer's attention are -119 * 119 * sqrt(32) = -80,107: even probabilities, but NaN in float16."""
    weight, bias = (weights[f"bottleneck.text.layers.0.attention.qkv.{name}"] for name in ("weight", "bias"))
    weight[:256] = 0
    bias[:128], bias[128:256] = 119, -119


def large_weights(weights) -> None:
    """A norm's weights, and those of the layer behind it, in another proportion: the same function."""
    for name in ("norm2.weight", "norm2.bias"):
        weights[f"bottleneck.text.layers.1.{name}"] *= 2.0**18
    weights["bottleneck.text.layers.1.fc1.weight"] *= 2.0**-18


def test_float16_as_a_gpu_computes_it(small, tmp_path):
    """ONNX's reference implementation rounds every result; ONNX Runtime on a CPU does not."""
    changes = lambda weights: (low_scores(weights), large_weights(weights))  # noqa: E731
    other, out = edited(small, tmp_path / "checkpoint", changes), tmp_path / "out"
    checkpoint = Checkpoint.open(other)
    pixels = VerificationInputs(checkpoint, 4).images
    with torch.inference_mode():
        expected = load(checkpoint, "encoder")(pixels)[0]
    options = ["--components", "encoder", "--no-captions", "--probes", "4", *LIMITS]
    assert toy.onnx.main(["--ckpt", str(other), "--out", str(out), "--precision", "fp16", *options]) == 0
    assert Manifest.open(out).checked("encoder").fp32_blocks == (BLOCK, BLOCK.replace("1", "0"))
    (found,) = ReferenceEvaluator(str(out / "encoder.onnx")).run(["context"], {"pixels": pixels.numpy()})
    assert compare(torch.from_numpy(found), expected)["rms"] < 5e-3


def test_zeros_are_right_where_zeros_are_expected(small, tmp_path):
    def zero(weights):
        for name in ("to_llm.2.weight", "to_llm.2.bias"):
            weights[name].zero_()

    other, out = edited(small, tmp_path / "checkpoint", zero), tmp_path / "out"
    options = ["--components", "encoder", "--no-captions", "--probes", "4", *LIMITS]
    assert toy.onnx.main(["--ckpt", str(other), "--out", str(out), *options]) == 0
    assert Manifest.open(out).checked("encoder").verification["outputs"]["prompts"] == {"max": 0, "rms": 0}


def test_weights_that_are_not_finite_are_named(small, tmp_path, capsys):
    def damage(weights):
        weights["bottleneck.text.layers.1.fc2.weight"][3, 5] = float("nan")

    other = edited(small, tmp_path / "checkpoint", damage)
    command = ["--ckpt", str(other), "--out", str(tmp_path / "out"), "--components", "encoder", "--no-captions"]
    assert toy.onnx.main(command) == 1
    error = capsys.readouterr().err.strip()
    assert "encoder.bottleneck.text.layers.1.fc2.weight is not finite: copy the checkpoint again" in error
    assert "\n" not in error and not (tmp_path / "out" / "manifest.json").exists()


def test_what_no_block_can_help_is_refused(small, tmp_path, capsys):
    """The residual stream itself is too large."""
    other = rescale(small, tmp_path / "checkpoint", between=2.0**8)
    out = tmp_path / "out"
    for precision in ("fp16", "int8-trt"):
        code = toy.onnx.main(
            ["--ckpt", str(other), "--out", str(out), *LIMITS, "--precision", precision, "--probes", "4",
             "--components", "encoder", "--no-captions", "--allow-drift"]
        )  # fmt: skip
        error = capsys.readouterr().err
        assert code == 1 and "float16 ends at 65,504: use --precision bf16 or fp32" in error
        assert not (out / "encoder.onnx").exists()


@pytest.mark.parametrize("name", ["encoder", "text_encoder", "unet", "vae_encoder"])
def test_the_bundled_model_needs_no_float32(checkpoint, probes, tmp_path, name):
    """No mask and no constant counts as an overflow; the ranges are those of the float16 values."""
    graph = load(checkpoint, name).cast(torch.float16)
    traced = trace.to_onnx(graph, tmp_path / f"{name}.onnx", Batch(1, 1, 4), 20)
    rows = ({key: value.numpy() for key, value in row.items()} for row in probes.single(name))
    ranges = overflow.float16_ranges(tmp_path / traced.files[0], traced, rows)
    assert len(ranges) > 20 and all(0 <= one.max < overflow.MAX for one in ranges)
    assert overflow.overflowing(ranges, ()) == (set(), [])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(traced.files)


def test_ranges_are_those_of_the_values(tmp_path):
    """A block's product, 2 x 3 x 64 = 384 here, and the value between the blocks."""

    class Constant(graphs.Graph):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(2))
            for layer in self.layers:
                layer.weight.data.fill_(3.0)
            self.inputs, self.outputs = (graphs.Port("x", "float32", (64,)),), ("y",)
            self.blocks = ("layers.0", "layers.1")

        def forward(self, x):
            return self.layers[1](self.layers[0](x.to(self.dtype)) * 2).float()

    traced = trace.to_onnx(Constant().cast(torch.float16), tmp_path / "x.onnx", Batch(1, 1, 4), 20)
    rows = [{"x": torch.full((2, 64), value).numpy()} for value in (-2.0, 1.0)]
    ranges = {one.value: one for one in overflow.float16_ranges(tmp_path / "x.onnx", traced, rows)}
    assert sorted((one.block or "", one.max) for one in ranges.values()) == [
        ("", 2.0), ("", 768.0), ("layers.0", 384.0), ("layers.1", 3.0 * 64 * 768)
    ]  # fmt: skip
    blocks, others = overflow.overflowing(ranges.values(), ())
    assert blocks == {"layers.1"} and not others
    blocks, others = overflow.overflowing(ranges.values(), {"layers.1"})
    assert not blocks and [one.block for one in others] == ["layers.1"]
