"""Tokens to text as they come: the same text as at once, no torn character, and stop strings wherever they fall."""

from __future__ import annotations

import random

import pytest

from serve.engines.detokenize import Detokenizer

TEXT = "A red apple. Ein Bäumchen 🍎 is left of it.\nThe end"


@pytest.fixture(scope="module")
def tokenizer(captioning_checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(captioning_checkpoint / "llm")


def read(tokenizer, text: str, stop=(), seed=0, tail=()):
    """Text, ids kept and pieces of a caption whose tokens arrive in steps of 1 to 4."""
    ids = tokenizer(text, add_special_tokens=False).input_ids + list(tail)
    draw, out, kept, pieces = random.Random(seed), Detokenizer(tokenizer, (tokenizer.eos_token_id,), stop), [], []
    while ids and not out.ended:
        step, ids = ids[: (n := draw.randint(1, 4))], ids[n:]
        piece, new = out.push(step)
        pieces.append(piece)
        kept += new
    pieces.append(out.rest())
    return "".join(pieces), kept, pieces


@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_the_whole(tokenizer, seed):
    text, kept, pieces = read(tokenizer, TEXT, ("never", "The end of"), seed)
    assert text == TEXT and "\ufffd" not in text and len([p for p in pieces if p]) > 5
    assert kept == tokenizer(TEXT, add_special_tokens=False).input_ids


@pytest.mark.parametrize("seed", range(5))
def test_the_end_token_ends(tokenizer, seed):
    end = tokenizer.eos_token_id
    assert read(tokenizer, "One. The", ("The end",), seed, [end, *tokenizer("Two").input_ids])[0] == "One. The"


@pytest.mark.parametrize("stop", ["A", " apple", "apple. E", "🍎", "is left of it.\n", "The end", "d apple"])
def test_stops_before_the_first_stop_string(tokenizer, stop):
    for seed in range(5):
        assert read(tokenizer, TEXT, ("never", stop, "end"), seed)[0] == TEXT[: TEXT.index(stop)]


def test_a_torn_character_at_the_end_is_left_out(tokenizer):
    ids = tokenizer("Oh 🍎", add_special_tokens=False).input_ids
    out = Detokenizer(tokenizer, (tokenizer.eos_token_id,))
    assert out.push(ids[:-1])[0] + out.rest() == "Oh "
