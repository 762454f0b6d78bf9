"""Greedy decoding is greedy whatever generation_config.json says, and ends at every end token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from vlv.checkpoints.folder import Checkpoint
from vlv.data import scenes
from vlv.model.captioner import Captioner
from vlv.model.generation import cut_at_end, greedy_generation_config, join_end_tokens

TOKENS = 40
# Qwen2.5-0.5B-Instruct's file (huggingface.co/Qwen/Qwen2.5-0.5B-Instruct), its ids left out
INSTRUCT = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
# every other kind of setting that changes the tokens
ADVERSARIAL = {
    "num_beams": 3,
    "length_penalty": -5.0,
    "num_return_sequences": 2,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_length": 60,
    "min_new_tokens": 35,
    "max_length": 7,
    "max_time": 1e-6,
    "forced_eos_token_id": 5,
    "suppress_tokens": list(range(20, 200)),
    "begin_suppress_tokens": list(range(10, 400)),
    "bad_words_ids": [[i] for i in range(20, 120)],
    "sequence_bias": [[[30], 9.0]],
    "exponential_decay_length_penalty": [1, 3.0],
    "renormalize_logits": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "penalty_alpha": 0.6,
    "made_up_field": 1,
}


def argmax_loop(captioner: Captioner, prompt: torch.Tensor, ends: tuple[int, ...]) -> list[int]:
    """Decode one prompt [N, C] by the plain definition of greedy decoding."""
    embeds, ids = prompt[None], []
    for _ in range(TOKENS):
        token = captioner.llm(inputs_embeds=embeds).logits[0, -1].argmax().item()
        if token in ends:
            break
        ids.append(token)
        embeds = torch.cat([embeds, captioner.llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return ids


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    rendered = [scenes.render(scenes.sample(scenes.HELD_OUT + i)) for i in range(3)]
    return torch.stack([torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in rendered])


def with_settings(checkpoint: Path, folder: Path, settings: dict) -> Captioner:
    """Load a copy of a checkpoint whose generation_config.json has other settings."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("t2i"))
    file = folder / "llm" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return Captioner.load(Checkpoint.open(folder))


@pytest.mark.parametrize("settings", [INSTRUCT, ADVERSARIAL], ids=["instruct", "adversarial"])
@torch.inference_mode()
def test_greedy_is_the_argmax(settings, captioning_checkpoint, pixels, tmp_path):
    captioner = with_settings(captioning_checkpoint, tmp_path / "copy", settings)
    expected = [argmax_loop(captioner, row, captioner.end_tokens) for row in captioner.encoder(pixels)]
    assert all(len(row) > 10 for row in expected)
    assert captioner.generate(pixels, max_new_tokens=TOKENS) == expected


def test_beams_and_samples_take_nothing_from_the_file_either(captioning_checkpoint, pixels, tmp_path):
    plain = Captioner.load(Checkpoint.open(captioning_checkpoint))
    other = with_settings(captioning_checkpoint, tmp_path / "copy", ADVERSARIAL)
    for options in ({"num_beams": 4}, {"temperature": 1.0}):
        torch.manual_seed(0)
        expected = plain.generate(pixels, max_new_tokens=TOKENS, **options)
        torch.manual_seed(0)
        assert other.generate(pixels, max_new_tokens=TOKENS, **options) == expected


@torch.inference_mode()
def test_generation_ends_at_each_end_token(captioning_checkpoint, pixels, tmp_path):
    """The model's list of end tokens and the tokenizer's end token count together."""
    plain = Captioner.load(Checkpoint.open(captioning_checkpoint))
    (whole,) = plain.generate(pixels[:1], max_new_tokens=TOKENS)
    middle = whole[7]
    captioner = with_settings(captioning_checkpoint, tmp_path / "copy", {"eos_token_id": [middle]})
    assert captioner.end_tokens == (captioner.tokenizer.eos_token_id, middle)
    assert captioner.generate(pixels[:1], max_new_tokens=TOKENS) == [whole[: whole.index(middle)]]
    assert plain.generate(pixels[:1], max_new_tokens=TOKENS) == [whole]


def test_the_settings_of_the_model_stay(captioning_checkpoint, pixels, tmp_path):
    captioner = with_settings(captioning_checkpoint, tmp_path / "copy", INSTRUCT)
    before = captioner.llm.generation_config.to_dict()
    captioner.generate(pixels[:1], max_new_tokens=4)
    assert captioner.llm.generation_config.to_dict() == before


def test_end_tokens_outside_the_vocabulary_are_refused(captioning_checkpoint):
    llm = Captioner.load(Checkpoint.open(captioning_checkpoint)).llm
    for ends in ((), (-1,), (0, 10_000)):
        with pytest.raises(ValueError, match="expected at least one, each from 0 to"):
            greedy_generation_config(llm, 3, ends)


def test_joining_and_cutting():
    assert join_end_tokens(5, [7, 5], None, 0) == (5, 7, 0)
    assert cut_at_end([1, 2, 0, 3], (0, 9)) == [1, 2]
    assert cut_at_end([1, 9, 0], (0, 9)) == [1]
    assert cut_at_end([1, 2], (0,)) == [1, 2]
