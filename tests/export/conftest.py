"""The bundled checkpoint, exported once; sizes come from the checkpoint, which may be retrained in other ones."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from export import onnx, trace
from export.verification import captions
from export.verification.inputs import VerificationInputs
from vlv.checkpoints.folder import Checkpoint

BUNDLED = Path(__file__).parents[2] / "assets" / "vlv-tiny"
LIMITS = ["--max-batch", "5", "--max-images", "2"]


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(BUNDLED)


@pytest.fixture(scope="module")
def probes(checkpoint) -> VerificationInputs:
    return VerificationInputs(checkpoint, 6)


def content(graph, *more) -> str:
    """Return a hash of what decides how a graph is traced: its class, modules, tensors and dtypes, and `more`."""
    described = (type(graph), graph, graph.dtype, graph.inputs, graph.outputs, graph.blocks, *more)
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def traced_once(built_once):
    """Return `trace.to_onnx`, which copies the files of a graph with the same content if this run has traced one.

    Tracing is most of an export, and a precision, a flag or a later step is what most tests are about.
    """
    traces = trace.to_onnx

    def to_onnx(graph, file: Path, profile, opset: int, add_bodies=None) -> trace.Traced:
        def build(folder: Path) -> None:
            traced = traces(graph, folder / file.name, profile, opset)
            (folder / "traced.pickle").write_bytes(pickle.dumps(traced))

        if add_bodies:  # a function, whose content is not known
            return traces(graph, file, profile, opset, add_bodies)
        batch = profile.min, max(profile.max, trace.TRACED_BATCH)
        folder = built_once(f"trace-{content(graph, file.name, batch, opset, trace.EXTERNAL)}", build)
        traced = pickle.loads((folder / "traced.pickle").read_bytes())
        for name in traced.files:
            shutil.move(folder / name, file.with_name(name))
        return traced

    return to_onnx


@pytest.fixture(scope="module", autouse=True)
def _traced_once(traced_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "to_onnx", traced_once)
        yield


@pytest.fixture(scope="session")
def artifacts(built_once, traced_once) -> Path:
    """All components in float32."""

    def build(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "to_onnx", traced_once)
            assert onnx.main(["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS]) == 0

    return built_once("artifacts", build)


@pytest.fixture
def copied(artifacts, tmp_path) -> Path:
    """The same, to damage."""
    return Path(shutil.copytree(artifacts, tmp_path / "copied"))


@pytest.fixture
def few_scenes(monkeypatch):
    """Compare captions of one batch of scenes at most: how many make a verdict certain is tested in test_captions."""
    monkeypatch.setattr(captions, "MAX_SCENES", captions.SCENES)
