"""The three stages at the smallest size: every folder that they write loads and does its work."""

import shutil

import pytest
import torch

from tests.vlv.train.conftest import NARROW
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.data import scene_batches as data
from vlv.data import scenes
from vlv.data.latents import scene_latents
from vlv.diffusion.t2i import T2I
from vlv.model.captioner import Captioner
from vlv.train import t2i
from vlv.train.config import RunOptions
from vlv.train.initialize import build_t2i
from vlv.train.parallel import World


def test_the_t2i_folder_is_a_plain_diffusers_pipeline(run):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run / "t2i", safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a large cat at the top left", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)


def test_a_resumed_run_scales_the_latents_alike(run, tmp_path):
    shutil.copytree(run / "vae.saves", tmp_path / "vae.saves")
    torch.manual_seed(1)
    again = build_t2i(NARROW)
    with World.start("cpu") as world:
        t2i.train_vae(again, NARROW, RunOptions(tmp_path, tmp_path / "t2i"), world)
    assert again.vae.config.scaling_factor == T2I.load(run / "t2i").vae.config.scaling_factor


def test_latents_are_kept_by_what_made_them(run, tmp_path):
    assert len(list(run.glob("latents-*.pt"))) == 1  # the UNet's training and stage 1 share them
    model = T2I.load(run / "t2i")
    first = scene_latents(model, 4, tmp_path)
    assert len(scene_latents(model, 8, tmp_path)) == 8  # another pool
    model.vae.encoder.conv_in.weight.mul_(2)
    other = scene_latents(model, 4, tmp_path)
    assert not torch.equal(other, first) and len(list(tmp_path.iterdir())) == 3


def test_stage_1_leaves_the_frozen_parts_alone(run):
    frozen = T2I.load(run / "t2i")
    encoder = Checkpoint.open(run / "stage1").load_encoder()
    clip = frozen.text_encoder.state_dict()
    layer = encoder.bottleneck.text.layers[0]
    assert torch.equal(layer.fc1.weight, clip["encoder.layers.0.mlp.fc1.weight"].float())
    with pytest.raises(CheckpointError, match="no llm/"):
        Checkpoint.open(run / "stage1").llm  # noqa: B018


def test_stage_2_leaves_queries_projection_and_clip_alone(run):
    before = Checkpoint.open(run / "stage1").load_encoder().bottleneck
    after = Checkpoint.open(run / "stage2").load_encoder().bottleneck
    assert torch.equal(before.queries, after.queries)
    for a, b in ((before.projection, after.projection), (before.text, after.text)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(before.prompt, after.prompt)


def test_the_whole_checkpoint_captions_and_reconstructs(run):
    checkpoint = Checkpoint.open(run / "stage2")
    pixels = data.images(range(scenes.HELD_OUT, scenes.HELD_OUT + 2))
    captions = Captioner.load(checkpoint).captions(pixels, max_new_tokens=8)
    assert len(captions) == 2
    context = checkpoint.load_encoder().context(pixels)
    both = T2I.load(checkpoint.t2i).reconstruct(context, steps=2)
    assert both.dtype == torch.uint8 and both.shape == pixels.shape
    alone = T2I.load(checkpoint.t2i).reconstruct(context[1:], steps=2)
    assert (alone[0].int() - both[1].int()).abs().max() <= 1  # the batch does not matter


def test_a_context_of_another_length_is_refused(run):
    model = T2I.load(run / "t2i")
    with pytest.raises(ValueError, match="5 tokens"):
        model.reconstruct(torch.zeros(1, 5, 128), steps=1)


def test_clip_layers_agree_with_transformers(run):
    """Our text layers on transformers' token embeddings give the text encoder's context."""
    model = T2I.load(run / "t2i")
    encoder = Checkpoint.open(run / "stage1").load_encoder()
    ids = model.tokenizer(["a small bus"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    ours = encoder.bottleneck.text(model.text_encoder.embeddings.token_embedding(ids))
    theirs = model.encode_text(["a small bus"])
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
