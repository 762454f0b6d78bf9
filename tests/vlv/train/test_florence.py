"""The start of stage 1 from Florence-2 and a text-to-image model, on the slim copy of the published weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vlv.official import SLIM, slim_weights
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.published_read import convert
from vlv.checkpoints.published_write import to_published
from vlv.train.florence import write_start

FLORENCE, CLIP = "VLV_model.model.", "VLV_model.text_encoder.text_model."


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The published weights taken apart: a Florence-2 folder and a diffusers folder."""
    folder = tmp_path_factory.mktemp("parts")
    weights = {n: w.clone() for n, w in slim_weights().items()}
    shutil.copytree(SLIM / "florence2", folder / "florence")
    shutil.copytree(SLIM / "text_encoder", folder / "sd" / "text_encoder")
    (folder / "sd" / "model_index.json").write_text("{}")
    for place, prefix, put in (("florence", FLORENCE, ""), ("sd/text_encoder", CLIP, "text_model.")):
        own = {put + n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        save_file(own, folder / place / "model.safetensors")
    torch.save(weights, folder / "model.pt")
    return folder


def test_everything_that_is_pretrained_is_where_a_published_checkpoint_has_it(parts, tmp_path):
    made = write_start(parts / "florence", parts / "sd", tmp_path / "start", queries=9).load_encoder().state_dict()
    beside = [str(SLIM / name) for name in ("florence2", "text_encoder", "qwen")]
    published = convert(parts / "model.pt", tmp_path / "whole", *beside).load_encoder().state_dict()
    fresh = {"bottleneck.queries"} | {f"bottleneck.projection.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    for name in made.keys() - fresh:
        expected = published[name][:9] if name.endswith("text.positions") else published[name]
        assert torch.equal(made[name], expected), name
    assert made["bottleneck.queries"].shape[0] == 9 and 0.8 < made["bottleneck.queries"].std() < 1.2
    assert "reconstruct" in Checkpoint.open(tmp_path / "start").can


def test_the_start_goes_back_to_the_published_layout(parts, tmp_path):
    """Every published name of stage 1 is there, so that what is trained from the start can be given back as well."""
    made = write_start(parts / "florence", parts / "sd", tmp_path / "start")
    back = load_file(to_published(made.folder, tmp_path / "back") / "model.safetensors")
    published = torch.load(parts / "model.pt", weights_only=True)
    stage1 = {name.removeprefix("VLV_model.") for name in published if name.startswith("VLV_model.")}
    assert back.keys() == stage1
    for name in stage1 - {"query_embed", *(n for n in stage1 if n.startswith("language_proj."))}:
        assert torch.equal(back[name], published[f"VLV_model.{name}"].float()), name
    beside = [str(SLIM / name) for name in ("florence2", "text_encoder")]
    again = convert(tmp_path / "back", tmp_path / "again", *beside).load_encoder().state_dict()
    expected = made.load_encoder().state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)


def test_other_weights_are_refused(parts, tmp_path):
    with pytest.raises(CheckpointError, match="expected Florence-2 as Microsoft released it"):
        write_start(parts / "sd" / "text_encoder", parts / "sd", tmp_path / "out")
    assert not (tmp_path / "out").exists()
