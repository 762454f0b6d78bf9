"""What the manifest refuses, before anything is deserialized, and with the command that rebuilds it."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from export.components import Batch, Component, tolerance
from export.manifest import Artifact, ArtifactError, Manifest, describe_files, source_hash
from export.runtimes.factory import open_runtime
from vlv.checkpoints.folder import Checkpoint


def edit(folder, change) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def refused(folder, component="encoder", checkpoint=None) -> str:
    """The sentence with which an engine refuses the folder."""
    with pytest.raises(ArtifactError) as caught:
        open_runtime("onnx", folder, checkpoint).session(component)
    return str(caught.value)


def test_damage_is_found_before_loading(copied):
    file = copied / "encoder.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    sentence = refused(copied)
    assert "its hash differs" in sentence and "python -m export.onnx" in sentence and "--components encoder" in sentence
    os.truncate(file, 100)
    assert "has 100 bytes instead of" in refused(copied)
    file.unlink()
    assert "encoder.onnx is missing; make it again" in refused(copied)


def test_weights_of_another_checkpoint(artifacts, random_checkpoint, checkpoint):
    other = Checkpoint.open(random_checkpoint)
    assert "was made from other weights" in refused(artifacts, checkpoint=other)
    assert source_hash(checkpoint, "encoder") != source_hash(checkpoint, "unet")


def test_a_manifest_that_is_none(copied, tmp_path):
    assert "no artifacts in" in refused(tmp_path)
    edit(copied, lambda values: values.update(format=1))
    assert "has format 1; this version reads 2" in refused(copied)
    (copied / "manifest.json").write_text('{"format": 2, "artifacts": {"encoder": {}}}')
    assert "is damaged" in refused(copied)
    (copied / "manifest.json").write_text("[]")
    assert "is damaged" in refused(copied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {}}, "encoder has no files"),
        ({"files": {"encoder.onnx": {"bytes": 1}}}, "one without a hash"),
        ({"precision": "fp99"}, "precision is 'fp99', expected one of fp32, fp16"),
        ({"component": "decoder"}, "component is 'decoder', expected one of encoder"),
        ({"component": "unet"}, "encoder holds the entry of unet"),
        ({"runtime": "cuda"}, "runtime is 'cuda'"),
        ({"inputs": []}, "encoder has no inputs or no outputs"),
        ({"outputs": []}, "encoder has no inputs or no outputs"),
        (
            {"inputs": [{"name": "pixels", "dtype": "float8", "shape": [3, 64, 64], "batched": True}]},
            "pixels is float8",
        ),
    ],
)
def test_entries_that_no_export_writes(copied, change, words):
    edit(copied, lambda values: values["artifacts"]["encoder"].update(change))
    sentence = refused(copied)
    assert "is damaged" in sentence and words in sentence and "delete the folder and export again" in sentence


def test_a_graph_that_does_not_fit_its_entry(copied):
    """Files whose hashes are right, but of another graph, or no graph."""

    def exchange(content):
        (copied / "encoder.onnx").write_bytes(content)
        files = describe_files(copied, ["encoder.onnx"])
        edit(copied, lambda values: values["artifacts"]["encoder"].update(files=files))
        return refused(copied)

    sentence = exchange((copied / "vae_encoder.onnx").read_bytes())
    assert "has context as None, its entry in the manifest as [32, 128]; make it again: python" in sentence
    sentence = exchange(b"no graph")
    assert "ONNX Runtime does not load" in sentence and "; make it again: python" in sentence


def test_files_outside_the_folder(copied):
    def point_out(values):
        values["artifacts"]["encoder"]["files"] = {"../secret": {"bytes": 1, "sha256": ""}}

    edit(copied, point_out)
    assert "points outside its folder" in refused(copied)


def test_an_engine_that_is_older_than_its_graph(copied):
    manifest = Manifest.open(copied)
    graph = manifest.artifacts["context_kv"]
    engine = dataclasses.replace(graph, runtime="rtx", target="sm89", graph="older")
    manifest.artifacts[engine.name] = engine
    manifest.save()
    with pytest.raises(ArtifactError, match=r"context_kv@rtx-sm89 .* is older than its graph"):
        Manifest.open(copied).checked("context_kv", "rtx", "sm89")
    with pytest.raises(ArtifactError, match=r"has no context_kv@rtx-sm86 .*--target sm86 --components context_kv"):
        manifest.find("context_kv", "rtx", "sm86")


@pytest.mark.parametrize("key", ["source", "precision", "opset", "builder", "kernels"])
def test_what_makes_an_artifact_stale(artifacts, key):
    manifest = Manifest.open(artifacts)
    there = manifest.artifacts["text_encoder"]
    assert manifest.current(there)
    assert not manifest.current(dataclasses.replace(there, **{key: 0}))
    assert not manifest.current(dataclasses.replace(there, profile=Batch(1, 1, 1)))


def test_round_trip(artifacts):
    manifest = Manifest.open(artifacts)
    for artifact in manifest.artifacts.values():
        assert Artifact.from_dict(json.loads(json.dumps(dataclasses.asdict(artifact)))) == artifact


def test_profiles():
    assert Batch.up_to(3) == Batch(1, 3, 3) and Batch.up_to(32) == Batch(1, 8, 32)
    assert Component("unet", "t2i", rows=2).profile(Batch(1, 1, 1), Batch(1, 2, 8)) == Batch(1, 4, 16)
    assert Batch(1, 8, 32).odd == (1, 3, 7, 32) and Batch(1, 1, 1).odd == (1,)
    with pytest.raises(ValueError, match="must ascend"):
        Batch(1, 9, 8)


def test_tolerances_follow_the_precision_and_the_depth():
    assert tolerance("fp32", 16, 1024) < tolerance("fp16", 16, 1024) < tolerance("bf16", 16, 1024)
    assert tolerance("fp16", 64, 1) == pytest.approx(2 * tolerance("fp16", 16, 1))
