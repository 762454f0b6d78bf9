"""The checkpoint folder: saved, opened, described, and every way in which it can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vlv.agreement import random_weights
from vlv import checkpoint as command
from vlv.checkpoints import folder as checkpoint
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.tensor_files import write_safetensors
from vlv.common.files import link_tree
from vlv.model.config import FORMAT, PRESETS
from vlv.model.encoder import VLVEncoder


@pytest.fixture(scope="module")
def encoder() -> VLVEncoder:
    return random_weights(VLVEncoder(PRESETS["tiny"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_not_contiguous_is_written_as_it_is_indexed(tmp_path, dtype):
    """Transposed, sliced and expanded tensors, whose order in memory is another."""
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {"transposed": x.transpose(0, 2), "sliced": x[:, 1:, ::2], "expanded": x[0, 0].expand(5, 4)}
    assert not any(tensor.is_contiguous() for tensor in tensors.values())
    plan = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", plan, tensors.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], one) for name, one in tensors.items())


def test_the_hash_is_of_what_is_loaded(captioning_checkpoint, tmp_path):
    """Files that the system or an editor adds, and line ends that a copy changes, are not the model."""
    copy = Path(shutil.copytree(captioning_checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("t2i")))
    expected = Checkpoint.open(copy).hash
    (copy / "llm" / ".DS_Store").write_bytes(b"Bud1")
    (copy / "llm" / "._model.safetensors").write_bytes(b"x")
    (copy / "llm" / "README.md").write_text("about")
    (copy / "llm" / "pytorch_model.bin").write_bytes(b"stale")
    for file in (copy / "vlv.json", copy / "llm" / "config.json"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert Checkpoint.open(copy).hash == expected
    values = json.loads((copy / "vlv.json").read_text())
    (copy / "vlv.json").write_text(json.dumps(values))
    assert Checkpoint.open(copy).hash == expected == Checkpoint.open(captioning_checkpoint).hash
    for change in (
        lambda: rewrite(copy, model={**values["model"], "queries": 31}),
        lambda: (copy / "llm" / "generation_config.json").write_text("{}"),
        lambda: (copy / "llm" / "model.safetensors").write_bytes(b"other"),
    ):
        change()
        assert Checkpoint.open(copy).hash != expected
        expected = Checkpoint.open(copy).hash


@pytest.fixture
def folder(encoder, tmp_path) -> Path:
    checkpoint.save(tmp_path / "saved", encoder)
    return tmp_path / "saved"


def test_what_is_saved_is_loaded(encoder, folder):
    opened = Checkpoint.open(folder)
    assert opened.config == encoder.config
    loaded = opened.load_encoder()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(loaded(pixels), encoder(pixels))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_dtype_and_loaded_dtype_are_free(dtype, encoder, tmp_path):
    opened = checkpoint.save(tmp_path / "half", encoder, dtype)
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert opened.describe()["parts"]["encoder"][0]["parameters"].keys() == {name}
    assert opened.load_encoder().dtype == torch.float32
    assert opened.load_encoder(dtype).dtype == dtype


def test_hash_follows_the_content(encoder, folder, tmp_path):
    same = checkpoint.save(tmp_path / "same", encoder)
    assert Checkpoint.open(folder).hash == same.hash and len(same.hash) == 12
    with torch.no_grad():
        other = random_weights(VLVEncoder(PRESETS["tiny"]), seed=1)
    changed = checkpoint.save(tmp_path / "same", other)
    assert changed.hash != Checkpoint.open(folder).hash


def test_saving_over_a_loaded_checkpoint_leaves_the_loaded_one_alone(encoder, folder):
    """The weights are mapped from the file: replacing it must not change them."""
    loaded = Checkpoint.open(folder).load_encoder()
    before = loaded.bottleneck.queries.clone()
    checkpoint.save(folder, random_weights(VLVEncoder(PRESETS["tiny"]), seed=1))
    assert torch.equal(loaded.bottleneck.queries, before)


def test_description(folder, capsys):
    described = Checkpoint.open(folder).describe()
    (encoder,) = described["parts"]["encoder"]
    assert encoder["bytes"] == (folder / "encoder.safetensors").stat().st_size
    assert described["can"] == [] and described["parts"]["llm"] == []
    assert command.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "can only encode" in text and "M F32" in text and encoder["sha256"][:12] in text
    assert command.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hash"] == described["hash"]


def test_a_linked_folder_is_whole_or_absent(random_checkpoint, tmp_path, monkeypatch):
    def stopped(source, target):
        real(source, target)
        raise KeyboardInterrupt

    def refused(source, target):
        raise OSError  # as between file systems

    real, source, target = shutil.copyfile, random_checkpoint / "llm", tmp_path / "t2i"
    monkeypatch.setattr("os.link", refused)
    monkeypatch.setattr("shutil.copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        link_tree(source, target)
    assert not target.exists()
    monkeypatch.undo()
    link_tree(source, target)
    assert [f.name for f in tmp_path.iterdir()] == ["t2i"] and len(list(target.iterdir())) == len(
        list(source.iterdir())
    )


def test_description_of_a_whole_checkpoint(random_checkpoint):
    described = Checkpoint.open(random_checkpoint).describe()
    assert described["can"] == ["caption"]
    assert [part["file"] for part in described["parts"]["llm"]] == ["llm/model.safetensors"]


def test_command_fails_in_one_sentence(tmp_path, capsys):
    assert command.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: no checkpoint at {tmp_path / 'none'}: expected a folder with vlv.json\n"


def rewrite(folder: Path, **changes) -> None:
    file = folder / "vlv.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folder_without_description(folder):
    (folder / "vlv.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no vlv\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "model": 3}', '{"format": 1, "model": {"vision": 7}}']
)
def test_damaged_description(text, folder):
    (folder / "vlv.json").write_text(text)
    with pytest.raises(CheckpointError, match="not readable"):
        Checkpoint.open(folder)


def test_newer_format(folder):
    rewrite(folder, format=FORMAT + 1)
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}; this version reads {FORMAT}: upgrade"):
        Checkpoint.open(folder)


def test_unknown_model_field(folder):
    rewrite(folder, model={"depth": 3})
    with pytest.raises(CheckpointError, match="unknown model fields"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"width": "wide"}, "width is 'wide', expected an integer of at least 1"),
        ({"width": -3}, "width is -3"),
        ({"heads": True}, "heads is True"),
        ({"upsample": 1.5}, "upsample is 1.5"),
        ({"queries": 0}, "queries is 0"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
        ({"context_activation": "relu"}, "context_activation is 'relu', expected gelu or quick_gelu"),
        ({"heads": 5}, "a width of 128 does not divide into 5 heads"),
        ({"image_size": 3}, "image_size 3 makes 0 rows, expected 1 to 8"),
        ({"image_positions": 3}, "makes 4 rows, expected 1 to 3"),
        ({"queries": 97}, "text_positions is 96, expected at least 97"),
        ({"text_positions": 20}, "text_positions is 20, expected at least 32"),
    ],
)
def test_impossible_sizes(field, words, folder, encoder):
    rewrite(folder, model={**encoder.config.to_dict(), **field})
    with pytest.raises(CheckpointError, match=f"describes no possible encoder: .*{words}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"window": 0}, "window is 0"),
        ({"heads": (2, 4)}, "the stages of vision differ in number"),
        ({"groups": (2, 4, 5)}, "a width of 192 does not divide into 5 heads or groups"),
        ({"dims": "wide"}, "the stages of vision differ in number"),
    ],
)
def test_impossible_sizes_of_the_vision_tower(field, words, folder, encoder):
    values = encoder.config.to_dict()
    rewrite(folder, model={**values, "vision": {**values["vision"], **field}})
    with pytest.raises(CheckpointError, match=f"describes no possible encoder: .*{words}"):
        Checkpoint.open(folder)


def test_wrong_width_is_named(folder, encoder):
    rewrite(folder, model=replace(encoder.config, llm_width=96).to_dict())
    with pytest.raises(CheckpointError, match=r"does not fit vlv\.json: to_llm\.0\.bias is \[128\], expected \[96\]"):
        Checkpoint.open(folder).load_encoder()


def test_whole_numbers_are_no_weights(folder):
    """Their values would have lost what follows the point."""
    tensors = load_file(folder / "encoder.safetensors")
    tensors["to_llm.0.bias"] = tensors["to_llm.0.bias"].to(torch.int64)
    save_file(tensors, folder / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"to_llm\.0\.bias is torch\.int64, expected floats"):
        Checkpoint.open(folder).load_encoder()


def test_stage_one_has_no_language_model(folder):
    with pytest.raises(CheckpointError, match="stage-1"):
        _ = Checkpoint.open(folder).llm
    with pytest.raises(CheckpointError, match="cannot reconstruct"):
        _ = Checkpoint.open(folder).t2i


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_truncated_weights(size, folder):
    os.truncate(folder / "encoder.safetensors", size)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.open(folder).load_encoder()


@pytest.mark.parametrize("size", [0, 5, 500])
def test_truncated_weights_cannot_be_described(size, folder):
    os.truncate(folder / "encoder.safetensors", size)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.open(folder).describe()


def test_weights_missing(folder):
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no encoder\.safetensors"):
        Checkpoint.open(folder).load_encoder()


def test_a_failed_save_leaves_the_old_one(folder, encoder, monkeypatch):
    before = Checkpoint.open(folder).hash

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, random_weights(VLVEncoder(PRESETS["tiny"]), seed=1))
    assert Checkpoint.open(folder).hash == before
    shutil.rmtree(folder)
