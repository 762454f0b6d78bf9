"""Byte-level BPE tokenizers for the toy models, in the formats of CLIP and Qwen2."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

END = "<|endoftext|>"


def _merges(texts: Iterable[str], empty, vocab_size: int, suffix: str) -> list[tuple[str, str]]:
    """Train BPE merges with the pre-tokenisation of `empty`, a tokenizer of the target class."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    bpe.normalizer = empty.backend_tokenizer.normalizer
    bpe.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix=suffix, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]


def clip_tokenizer(texts: Iterable[str], length: int, vocab_size: int = 1024):
    """A CLIPTokenizer whose vocabulary covers every byte and the merges of `texts`; pads to `length`."""
    from transformers import CLIPTokenizer

    merges = _merges(texts, CLIPTokenizer(), vocab_size, "</w>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", END]
    return CLIPTokenizer({w: i for i, w in enumerate(words)}, merges, model_max_length=length)


def qwen_tokenizer(texts: Iterable[str], vocab_size: int = 512):
    """A Qwen2Tokenizer over the merges of `texts`; its first id is the end-of-text and padding token."""
    from transformers import Qwen2Tokenizer

    merges = _merges(texts, Qwen2Tokenizer(), vocab_size, "")
    words = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    return Qwen2Tokenizer({w: i for i, w in enumerate(dict.fromkeys(words))}, merges, model_max_length=1024)
