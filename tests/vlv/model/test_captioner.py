"""Caption clean-up, the stage-2 loss, and generation against transformers."""

import pytest
import torch

from vlv.model.captioner import Captioner
from vlv.model.clean_up import clean_caption
from vlv.model.config import PRESETS
from vlv.model.encoder import VLVEncoder
from vlv.train.config import Synthetic
from vlv.train.initialize import build_llm


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A cat. A dog. A ca", "A cat. A dog."),
        ("A cat. A dog. A cat. A dog.", "A cat. A dog."),
        ("  A cat.\n\nA cat.", "A cat."),
        ("What a cat! A dog. What a cat! A bus.", "What a cat! A dog. A bus."),
        ("no period at all", "no period at all"),
        ("", ""),
    ],
)
def test_clean_caption(raw, clean):
    assert clean_caption(raw) == clean


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    llm, tokenizer = build_llm(Synthetic(scenes=0))
    return Captioner(VLVEncoder(PRESETS["tiny"]), llm, tokenizer).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_that_of_each_caption_alone(captioner, pixels):
    """Padding a short caption beside a long one changes nothing: the loss is the mean over all tokens."""
    captions = ["The image shows a large frog on a pink background.", "A cat.", "The car is above the small tree."]
    counts = [len(captioner.tokenizer(c).input_ids) + 1 for c in captions]
    single = [captioner.loss(pixels[i : i + 1], [c]) * n for i, (c, n) in enumerate(zip(captions, counts, strict=True))]
    assert torch.allclose(captioner.loss(pixels, captions), sum(single) / sum(counts), rtol=1e-5)


def test_greedy_tokens_follow_the_logits(captioner, pixels):
    prompt = captioner.encoder(pixels)
    for row, ids in zip(prompt, captioner.generate(pixels, max_new_tokens=6), strict=True):
        embeds = row[None]
        for token in ids:
            assert token == captioner.llm(inputs_embeds=embeds).logits[0, -1].argmax().item()
            embeds = torch.cat([embeds, captioner.llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)


def test_beams_and_batches_agree(captioner, pixels):
    together = captioner.generate(pixels, max_new_tokens=8, num_beams=4)
    assert together == [captioner.generate(pixels[i : i + 1], max_new_tokens=8, num_beams=4)[0] for i in range(3)]


def test_a_wrong_image_is_refused_with_its_shape(captioner):
    with pytest.raises(ValueError, match=r"\[B, 3, 64, 64\].*\[1, 3, 32, 32\]"):
        captioner.encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        captioner.encoder(torch.zeros(1, 3, 64, 64))
