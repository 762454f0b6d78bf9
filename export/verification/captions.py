"""Compare the greedy captions that a language model writes from the reference's and from an artifact's embeddings.

A rounding that swaps one token changes the rest of its caption, so what a few captions lose is mostly chance. Scenes
are therefore added until the verdict no longer depends on which ones were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from export.runtimes.torch import TorchRuntime
from export.verification.inputs import scene_images
from vlv.checkpoints.folder import Checkpoint
from vlv.model.captioner import Captioner
from vlv.model.generation import cut_at_end, greedy_generation_config

TOKENS = 96  # of a caption that are compared
SCENES = 64  # captioned together
MAX_SCENES = 1024
MAX_WORK = 1e12  # multiply-adds for the captions of one check: fewer scenes for a larger language model
CERTAIN = 3.0  # standard errors between the agreement and the limit that end the check
DOUBT = 2.0  # standard errors that are taken off where it stays uncertain
ENCODED = 16  # images that the reference encodes together
MAX_LOGITS = 1 << 26  # numbers in the scores of the captions that are checked together, 4 bytes each


@dataclass(frozen=True)
class Agreement:
    """The tokens of captions that stayed the same."""

    images: int
    tokens: int
    agreement: float  # share of equal tokens, position by position, up to the end of the longer caption
    error: float  # standard error of the agreement

    @classmethod
    def of(cls, kept: list[int], totals: list[int]) -> Agreement:
        """Compute from each caption's equal tokens and its length."""
        lost, lengths = np.subtract(totals, kept), np.array(totals)
        share = lost.sum() / lengths.sum()
        # a few captions lose most of their tokens and the others none: as if one more were lost whole, since a draw
        # with few of them says little of the next
        squares = np.square(lost - share * lengths).sum() + lengths.mean() ** 2
        return cls(len(totals), int(lengths.sum()), float(1 - share), float(np.sqrt(squares) / lengths.sum()))

    def is_certain(self, required: float) -> bool:
        """Return True if other scenes would hardly change the verdict."""
        return abs(self.agreement - required) > CERTAIN * self.error

    def passes(self, required: float) -> bool:
        """Return True if enough tokens stay: DOUBT standard errors more, if it is uncertain after MAX_SCENES."""
        doubt = self.images >= MAX_SCENES and not self.is_certain(required)
        return self.agreement - (DOUBT * self.error if doubt else 0) >= required


class Captions:
    """Greedy captions of the reference, made when first needed: of given images, and of as many scenes as it takes."""

    def __init__(self, checkpoint: Checkpoint, reference: TorchRuntime, images: Tensor, seed: int = 0):
        """images: uint8 [B, 3, S, S], captioned first; seed: chooses the scenes after them."""
        captioner = Captioner.load(checkpoint)
        self._llm = captioner.llm
        self._end_tokens = captioner.end_tokens
        self._reference = reference
        self._size = checkpoint.config.image_size
        self._seed = seed
        work = TOKENS * sum(parameter.numel() for parameter in self._llm.parameters())
        self._max_scenes = min(MAX_SCENES, int(MAX_WORK / work))
        self._batches = [(images, self.generate(self._prompts(images)))]

    @torch.inference_mode()
    def generate(self, prompts: Tensor) -> list[list[int]]:
        """Return the token ids of each caption, its end token included. prompts: float32 [B, N, H]."""
        config = greedy_generation_config(self._llm, TOKENS, self._end_tokens)
        rows = []
        for part in prompts.split(SCENES):
            mask = torch.ones(part.shape[:2], dtype=torch.long)
            rows += self._llm.generate(inputs_embeds=part, attention_mask=mask, generation_config=config).tolist()
        return [row[: len(cut_at_end(row, self._end_tokens)) + 1] for row in rows]

    @torch.inference_mode()
    def generate_like(self, prompts: Tensor, drafts: list[list[int]]) -> list[list[int]]:
        """Return what `generate` does, in one pass for the captions that equal their draft instead of one a token.

        A draft is the greedy caption if each of its tokens is the most likely after the prompt and the tokens before.
        """
        together = max(1, min(SCENES, MAX_LOGITS // (TOKENS * self._llm.config.get_text_config().vocab_size)))
        equal = []
        for i in range(0, len(drafts), together):
            tokens = pad_sequence([torch.tensor(row) for row in drafts[i : i + together]], True, -1)  # [B, T]
            before = self._llm.get_input_embeddings()(tokens[:, :-1].clamp(min=0))
            inputs = torch.cat([prompts[i : i + together], before.to(prompts.dtype)], 1)
            scores = self._llm(inputs_embeds=inputs, logits_to_keep=tokens.shape[1]).logits  # [B, T, vocabulary]
            equal += ((scores.argmax(-1) == tokens) | (tokens < 0)).all(1).tolist()
        others = [i for i, same in enumerate(equal) if not same]
        generated = dict(zip(others, self.generate(prompts[others]) if others else [], strict=True))
        return [generated.get(i, draft) for i, draft in enumerate(drafts)]

    def agreement(self, encode: Callable[[Tensor], Tensor], required: float, more: bool = True) -> Agreement:
        """Compare the captions from `encode(images)`, until it is certain whether `required` of the tokens stay.

        If all must stay (1.0), or without `more`, the given images alone are compared.
        """
        kept, totals = [], []
        for images, expected in self._in_batches():
            for caption, reference in zip(self.generate_like(encode(images), expected), expected, strict=True):
                totals.append(max(len(caption), len(reference)))
                kept.append(sum(a == b for a, b in zip(caption, reference, strict=False)))
            found = Agreement.of(kept, totals)
            if required == 1 or not more or found.is_certain(required):
                break
        return found

    def _in_batches(self) -> Iterator[tuple[Tensor, list[list[int]]]]:
        """Yield the given images, then scenes, with the reference's captions."""
        yield self._batches[0]
        for i in range(self._max_scenes // SCENES):
            if i + 1 == len(self._batches):
                images = scene_images(self._size, self._seed, i * SCENES, SCENES)
                self._batches.append((images, self.generate(self._prompts(images))))
            yield self._batches[i + 1]

    def _prompts(self, images: Tensor) -> Tensor:
        return torch.cat([self._reference.encode(part) for part in images.split(ENCODED)])
