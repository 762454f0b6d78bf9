"""What is no published checkpoint is refused in clear words, before anything is written or executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.vlv.official import Weights, sharded, untied
from vlv.checkpoints.folder import CheckpointError
from vlv.checkpoints.published_keys import LLM, TABLES
from vlv.checkpoints.published_read import convert
from vlv.common.files import OutputError, OutputExists


def test_problems_are_listed_by_name_and_nothing_is_written(weights: Weights, source: Path):
    broken = dict(weights)
    broken["VLV_model.extra.weight"] = torch.zeros(3)
    broken[LLM + "model.layers.7.mlp.weight"] = torch.zeros(3)
    del broken["mlp.layers.2.bias"]
    del broken[LLM + "model.layers.1.self_attn.q_proj.bias"]
    broken["VLV_model.language_proj.0.weight"] = torch.zeros(64, 65)
    broken[LLM + "model.norm.weight"] = torch.zeros(95)
    broken[TABLES[0]] = weights[TABLES[0]][:600]
    torch.save(broken, source / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        convert(source, source / "out")
    message = str(caught.value)
    for line in (
        "missing mlp.layers.2.bias",
        "missing qwen2_model.model.layers.1.self_attn.q_proj.bias",
        "unexpected VLV_model.extra.weight",
        "unexpected qwen2_model.model.layers.7.mlp.weight",
        "VLV_model.language_proj.0.weight is [64, 65], expected [64, 64]",
        "qwen2_model.model.norm.weight is [95], expected [96]",
        f"{TABLES[0]} is [600, 64], expected at least [47067, 64]",
    ):
        assert line in message
    assert not (source / "out").exists() and not list(source.glob(".*"))


def test_missing_last_layer_is_known_from_the_configuration(weights: Weights, source: Path):
    short = {n: t for n, t in weights.items() if "language_model.model.decoder.layers.1." not in n}
    torch.save(short, source / "model.pt")
    with pytest.raises(CheckpointError, match=r"missing .*decoder\.layers\.1\.encoder_attn\.k_proj\.bias"):
        convert(source, source / "out")


def test_foreign_weights_are_told_from_ours(source: Path):
    save_file({"bert.embeddings.weight": torch.zeros(3)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="no published VLV checkpoint: missing VLV_model"):
        convert(source, source / "out")


def test_heads_that_cannot_be_guessed_ask_for_the_configuration(weights: Weights, tmp_path: Path):
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"heads of the vision tower.*--florence"):
        convert(tmp_path / "model.pt", tmp_path / "out")


def test_configuration_of_another_model_is_refused(weights: Weights, source: Path):
    config = json.loads((source / "florence2" / "config.json").read_text())
    config["vision_config"]["dim_embed"] = [128, 256, 512, 1024]
    (source / "florence2" / "config.json").write_text(json.dumps(config))
    torch.save(weights, source / "model.pt")
    with pytest.raises(CheckpointError, match=r"stages are \[128, 256, 512, 1024\] wide.*\[16, 32, 64, 96\]"):
        convert(source, source / "out")


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("key", ["weights", "optimizer"])
def test_executable_pickles_are_refused(key: str, weights: Weights, source: Path, monkeypatch):
    monkeypatch.chdir(source)
    torch.save({"model_state_dict": weights, key: Evil()}, source / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        convert(source, source / "out")
    assert "is refused: its pickle holds a reference to " in str(caught.value) and "\n" not in str(caught.value)
    assert "system" in str(caught.value) and not (source / "owned").exists()


def test_other_files_under_a_weight_name(source: Path):
    file = source / "model.pt"
    for content, reason in (
        (pickle.dumps({"a": 1}), "zip format"),
        (b"", "zip format"),
        (b"PK\x03\x04" + bytes(100), "damaged or truncated"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            convert(file, source / "out")
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        convert(file, source / "out")


def test_truncated_files(weights: Weights, source: Path):
    save_file(untied(weights), source / "model.safetensors")
    torch.save(weights, source / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        os.truncate(source / name, 500_000)
        with pytest.raises(CheckpointError, match="damaged"):
            convert(source / name, source / "out")


def test_missing_shards_are_named(weights: Weights, source: Path):
    sharded(source, weights, "safetensors")
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards: model-00002-of-00003"):
        convert(source, source / "out")


def test_an_index_cannot_point_elsewhere(source: Path):
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        convert(source, source / "out")


def test_an_occupied_place_is_left_alone_unless_forced(weights: Weights, source: Path):
    torch.save(weights, source / "model.pt")
    (source / "out").mkdir()
    (source / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="--force"):
        convert(source, source / "out")
    assert (source / "out" / "thesis.txt").read_text() == "mine"
    convert(source, source / "out", force=True)
    assert not (source / "out" / "thesis.txt").exists()


def test_a_full_disk_is_noticed_before_writing(weights: Weights, source: Path, monkeypatch):
    torch.save(weights, source / "model.pt")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"needs 0\.0 GB, its disk has 0\.0 GB free: free some space or choose"):
        convert(source, source / "out")
    assert not (source / "out").exists()


def test_a_killed_run_leaves_nothing_in_the_way(weights: Weights, source: Path):
    torch.save(weights, source / "model.pt")
    (source / ".out.partial").mkdir()
    (source / ".out.partial" / "half.safetensors").write_bytes(b"x")
    convert(source, source / "out")
    assert not (source / ".out.partial").exists() and not (source / "out" / "half.safetensors").exists()
