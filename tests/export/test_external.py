"""Weights in a file of their own: it is written, run, vouched for, and refused when it is not what was exported."""

from __future__ import annotations

import os

import onnx as onnx_library
import onnx_ir
import pytest
import torch

from export import onnx, trace
from export.manifest import ArtifactError, Manifest, digest
from export.quantize.int8 import to_int8
from export.runtimes.factory import open_runtime
from export.runtimes.onnxruntime import OrtSession
from tests.export.conftest import BUNDLED, LIMITS

PROTOBUF = (1 << 31) - 1  # bytes that one ONNX file may have


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A component whose weights count as large."""
    out = tmp_path_factory.mktemp("external") / "artifacts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "EXTERNAL", 1000)
        command = ["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS, "--components", "context_kv", "--probes", "4"]
        assert onnx.main(command) == 0
    return out


def test_a_graph_beyond_protobufs_limit_has_its_weights_apart():
    """Four GiB of weights, which are named but never made."""
    large = onnx_ir.LazyTensor(lambda: pytest.fail("made"), onnx_ir.DataType.FLOAT, onnx_ir.Shape([1 << 15, 1 << 15]))
    assert large.nbytes > PROTOBUF and trace.is_large([large.nbytes])
    assert trace.is_large([PROTOBUF // 1000 + 1] * 1000) and trace.EXTERNAL < PROTOBUF
    assert not trace.is_large([1 << 20])


def test_weights_apart_run_and_are_vouched_for(apart, artifacts):
    artifact, inside = Manifest.open(apart).checked("context_kv"), Manifest.open(artifacts).checked("context_kv")
    assert list(artifact.files) == ["context_kv.onnx", "context_kv.onnx.data"]
    assert artifact.files["context_kv.onnx.data"]["bytes"] > 5 * artifact.files["context_kv.onnx"]["bytes"]
    inputs = {"context": torch.randn(2, *artifact.inputs[0].shape)}
    found, expected = (
        OrtSession.on_cpu(entry, folder)(**inputs) for entry, folder in ((artifact, apart), (inside, artifacts))
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_graphs_hash_covers_the_weights(apart):
    """No engine of a graph is taken for another's that differs in its weights alone."""
    artifact = Manifest.open(apart).artifacts["context_kv"]
    hashes = {name: entry["sha256"] for name, entry in artifact.files.items()}
    assert artifact.graph == digest(hashes) != digest({**hashes, "context_kv.onnx.data": "other"})


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_weights_are_refused(apart, damage):
    file = apart / "context_kv.onnx.data"
    before = file.read_bytes()
    try:
        if damage == "changed":
            file.write_bytes(before[:500] + bytes([before[500] ^ 1]) + before[501:])
        elif damage == "truncated":
            os.truncate(file, len(before) // 2)
        else:
            file.unlink()
        with pytest.raises(ArtifactError, match=rf"{file.name} (is|has) .*make it again: python -m export.onnx"):
            open_runtime("onnx", apart).session("context_kv")
    finally:
        file.write_bytes(before)


def test_int8_of_weights_apart(apart, tmp_path, monkeypatch):
    """Quantized weights lie apart as well, once however often it is tried, and the float32 ones are left behind."""
    monkeypatch.setattr(trace, "EXTERNAL", 1000)
    artifact = Manifest.open(apart).artifacts["context_kv"]
    traced = trace.Traced(list(artifact.files), artifact.blocks, {})
    for _ in range(2):
        written = to_int8(traced, apart, tmp_path)
        assert sorted(f.name for f in tmp_path.iterdir()) == sorted(written.files) == sorted(artifact.files)
        data = (tmp_path / written.files[1]).stat().st_size
        assert data < artifact.files["context_kv.onnx.data"]["bytes"] / 2
    nodes = onnx_library.load(tmp_path / written.files[0]).graph.node
    assert any(node.op_type == "MatMulInteger" for node in nodes)
