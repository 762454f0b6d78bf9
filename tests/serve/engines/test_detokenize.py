"""Tokens to text as they come: the same text as at once, no torn character, and stop strings wherever they fall."""

from __future__ import annotations

import random

import pytest

from serve.engines.detokenize import Detokenizer, decode

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


# several scripts, with characters of one to four bytes, and sequences of code points that show as one character
SCRIPTS = (
    "Ein Bäumchen, größer als café. "
    "Красное яблоко слева. "
    "一个红色的苹果在左边。桌子上有两只猫。"
    "赤いりんごが左にあります。"
    "لا تفاحة حمراء. "
    "एक लाल सेब बाईं ओर है। "
    "빨간 사과가 왼쪽에 있다. "
    "🍎🍏👩‍👩‍👧🇩🇪 𝔸 "
)


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer that splits nothing beforehand: its tokens end inside characters, some after whole ones.

    Returns it with the bytes of its tokens, by GPT-2's table of letters for bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<end>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, **options)
    lines = [SCRIPTS[i : i + 7] for i in range(len(SCRIPTS))] + list("界世丗丘🍋🍌🍐ñøß")
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    printable = {b for span in (range(33, 127), range(161, 173), range(174, 256)) for b in span}
    others = [b for b in range(256) if b not in printable]
    bytes_of = {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}
    return tokenizer, {i: bytes(bytes_of[c] for c in t) for t, i in backend.get_vocab().items() if t != "<end>"}


def chunked(ids: list[int], seed: int) -> list[list[int]]:
    draw, chunks = random.Random(seed), []
    while ids:
        n = draw.randint(1, 5)
        chunks.append(ids[:n])
        ids = ids[n:]
    return chunks


def streamed(tokenizer, chunks: list[list[int]], stop: tuple[str, ...] = ()) -> str:
    out = Detokenizer(tokenizer, (tokenizer.eos_token_id,), stop)
    pieces = []
    for chunk in chunks:
        pieces.append(out.push(chunk)[0])
        if out.ended:
            break
    return "".join(pieces) + out.rest()


def test_wherever_it_ends_only_the_torn_character_is_left_out(byte_level):
    """The bytes of the tokens say what is right: streamed or at once, all whole characters, and no part of one."""
    tokenizer, bytes_of = byte_level
    ids = tokenizer.encode(SCRIPTS)
    torn, after_whole_ones = 0, 0
    for end in range(len(ids) + 1):
        content = b"".join(bytes_of[i] for i in ids[:end])
        expected = content.decode("utf-8", "ignore")
        torn += len(expected.encode()) < len(content)
        # the last token has the end of one character and the start of the next
        rest = len(content) - len(expected.encode())
        after_whole_ones += bool(end and 0 < rest < len(bytes_of[ids[end - 1]]))
        assert decode(tokenizer, ids[:end]) == expected
        for chunks in (chunked(ids[:end], end), [[i] for i in ids[:end]], [ids[:end]]):
            assert streamed(tokenizer, chunks) == expected
            assert streamed(tokenizer, [*chunks, [tokenizer.eos_token_id]]) == expected
    assert torn >= 20 and after_whole_ones >= 5  # or the test shows nothing


def test_stop_strings_in_every_script_wherever_they_end(byte_level):
    """Also where the stop string's last character comes with a part of the next, and the ids end there."""
    tokenizer, bytes_of = byte_level
    ids = tokenizer.encode(SCRIPTS)
    for stop in ("äumchen", "é.", "яблоко", "苹果在", "。", "りんご", "تفاحة", "सेब", "사과", "🍏", "👩‍👧", "🇩🇪 𝔸"):
        for end in range(len(ids) + 1):
            text = b"".join(bytes_of[i] for i in ids[:end]).decode("utf-8", "ignore")
            expected = text[: text.index(stop)] if stop in text else text
            assert streamed(tokenizer, chunked(ids[:end], end), ("never", stop)) == expected, (stop, end)
