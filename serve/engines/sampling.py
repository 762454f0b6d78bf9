"""What a request asks of an engine, and what it gets. Light: neither torch nor transformers is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sampling:
    """How a caption is decoded."""

    max_tokens: int = 300
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of the random draws where the temperature is above 0
    stop: tuple[str, ...] = ()  # the caption ends before the first of these
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    top_k: int = 0  # sample from so many tokens; 0: all
    min_p: float = 0.0  # smallest probability of a token, relative to that of the likeliest
    min_tokens: int = 0  # the end token is not sampled before these
    ignore_eos: bool = False  # write max_tokens whatever comes
    logprobs: int | None = None  # log probabilities of each token and of so many alternatives (vllm)

    def draw(self, number: int) -> Sampling:
        """Return the sampling of one of several draws; the first has this seed.

        The others' seeds are hashes of seed and number. With seed + number, requests with consecutive seeds would draw
        the same captions (findings/vllm_seeded_samples.sh).
        """
        if not number:
            return self
        digest = hashlib.blake2b(f"{self.seed}.{number}".encode(), digest_size=4).digest()
        return replace(self, seed=int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Completion:
    """A caption, or a piece of one; `token_ids` without the end token."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": at an end token or a `stop` text; "length": cut at max_tokens
    logprobs: list[dict[int, float]] | None = None  # per token: its id and the alternatives' -> log probability


class Tokens(list[int]):
    """New token ids of one step, with their log probabilities if the request asked for them."""

    def __init__(self, ids: Iterable[int], logprobs: list[dict[int, float]] | None = None):
        super().__init__(ids)
        self.logprobs = logprobs
