"""Compare a language model in GGUF, run by llama.cpp, with float32 transformers on held-out scenes.

Greedy captions that differ in one token differ in all that follow, so three figures are taken. `agreement` is the share
of the reference's tokens that the file's model writes too, each after the reference's own tokens before it.
`captions_equal` counts the captions that it writes alike from the beginning. `claims` are the shares of its captions
that are right in what they say of a scene: of meaning for a model that describes these scenes, such as the bundled one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.builders.gguf import GGUFError
from export.runtimes.llama_library import Entry, Llama
from export.verification.inputs import scene_images, scene_numbers
from vlv.checkpoints.folder import Checkpoint
from vlv.data import scenes
from vlv.evaluate.synthetic.scenes import true_claims
from vlv.model.captioner import Captioner
from vlv.model.clean_up import clean_caption
from vlv.model.generation import cut_at_end, greedy_generation_config

TOKENS = 96  # of a caption that are compared, or as many as the model has positions for
ENCODED = 32  # scenes that the reference encodes and captions together
SEQUENCES = 8  # captions that llama.cpp decodes together
FLOORS = {"f32": 0.9999, "f16": 0.998, "q8_0": 0.985, "q4_k_m": 0.975, "q4_0": 0.96}  # of the agreement, by type
DESCRIBES = 0.9  # share of scenes whose objects the reference names, from which on claims are compared
MAX_LOSS = 0.02  # of a share of right claims
CLAIMS = ("objects", "count", "background", "relation")


@dataclass(frozen=True)
class Reference:
    """What float32 transformers writes of held-out scenes."""

    embeds: np.ndarray  # float32 [scenes, queries, width]
    rows: list[list[int]]  # token ids of each caption, its end token included
    ends: tuple[int, ...]
    numbers: range  # of the scenes
    captioner: Captioner

    @classmethod
    @torch.inference_mode()
    def of(cls, checkpoint: Checkpoint, count: int) -> Reference:
        """Caption `count` scenes with float32 PyTorch."""
        captioner = Captioner.load(checkpoint)
        images = scene_images(checkpoint.config.image_size, 0, 0, count)
        positions, queries = captioner.llm.config.max_position_embeddings, checkpoint.config.queries
        if positions <= queries:
            raise GGUFError(
                f"{checkpoint.llm} has {positions} positions, and an image's embeddings fill {queries}: no text fits"
            )
        config = greedy_generation_config(captioner.llm, min(TOKENS, positions - queries), captioner.end_tokens)
        embeds, rows = [], []
        for part in images.split(ENCODED):
            prompt = captioner.encoder(part)
            mask = torch.ones(prompt.shape[:2], dtype=torch.long)
            found = captioner.llm.generate(inputs_embeds=prompt, attention_mask=mask, generation_config=config)
            rows += [row[: len(cut_at_end(row, captioner.end_tokens)) + 1] for row in found.tolist()]
            embeds.append(prompt.numpy())
        return cls(np.concatenate(embeds), rows, captioner.end_tokens, scene_numbers(0, 0, count), captioner)

    def claims(self, rows: Sequence[list[int]]) -> dict[str, float]:
        """Return the shares of captions that are right, by kind of claim."""
        tokenizer = self.captioner.tokenizer
        texts = [clean_caption(tokenizer.decode(cut_at_end(row, self.ends))) for row in rows]
        found = true_claims(texts, [scenes.sample(scenes.HELD_OUT + number) for number in self.numbers])
        return {name: round(found[name], 4) for name in CLAIMS}

    def check(self, file: Path, kind: str) -> dict:
        """Return the figures of a GGUF file, and its problems. Raises LlamaError."""
        queries = self.embeds.shape[1]
        llama = Llama(file, SEQUENCES, SEQUENCES * (queries + TOKENS), max(1, len(os.sched_getaffinity(0)) // 2))
        try:
            forced = decode(llama, self.embeds, self.ends, self.rows)
            rows = decode(llama, self.embeds, self.ends)
        finally:
            llama.close()
        tokens = sum(map(len, self.rows))
        kept = sum(
            a == b for row, other in zip(forced, self.rows, strict=True) for a, b in zip(row, other, strict=True)
        )
        claims, expected = self.claims(rows), self.claims(self.rows)
        figures = {
            "scenes": len(self.rows),
            "tokens": tokens,
            "agreement": kept / tokens,
            "floor": FLOORS[kind],
            "captions_equal": sum(a == b for a, b in zip(rows, self.rows, strict=True)),
            "claims": claims,
            "claims_of_float32": expected,
        }
        return figures | {"problems": _problems(figures)}


def _problems(figures: dict) -> list[str]:
    problems = []
    if figures["agreement"] < figures["floor"]:
        problems.append(
            f"it writes {figures['agreement']:.2%} of float32's tokens; at least {figures['floor']:.2%} are required"
        )
    if figures["claims_of_float32"]["objects"] >= DESCRIBES:
        for name, expected in figures["claims_of_float32"].items():
            if (found := figures["claims"][name]) < expected - MAX_LOSS:
                problems.append(f"{name}: {found:.1%} of the captions are right, float32's {expected:.1%}")
    return problems


def decode(
    llama: Llama, embeds: np.ndarray, ends: Sequence[int], forced: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Continue embeds [captions, queries, width] greedily, up to TOKENS tokens or an end token, which is kept.

    A model with fewer positions gives fewer tokens.
    forced: token ids of every caption; then the choice at each is returned, made after the forced ones before it.
    """
    rows: list[list[int]] = [[] for _ in embeds]
    free, running, following = list(range(llama.sequences)), {}, 0  # running: sequence -> caption
    while following < len(embeds) or running:
        entries = []
        for sequence, caption in running.items():
            last = len(rows[caption]) - 1
            token = forced[caption][last] if forced else rows[caption][last]
            entries.append(Entry(sequence, embeds.shape[1] + last, token))
        room = llama.batch - len(entries)
        while free and following < len(embeds) and room >= embeds.shape[1]:
            sequence, room = free.pop(), room - embeds.shape[1]
            entries.append(Entry(sequence, 0, embeds[following]))
            running[sequence] = following
            following += 1
        for entry, token in zip(entries, llama.step(entries).argmax(axis=1).tolist(), strict=True):
            caption = running[entry.sequence]
            rows[caption].append(token)
            whole = len(forced[caption]) if forced else min(TOKENS, llama.max_position - embeds.shape[1])
            if len(rows[caption]) == whole or (token in ends and not forced):
                llama.release(entry.sequence)
                free.append(entry.sequence)
                del running[entry.sequence]
    return rows
