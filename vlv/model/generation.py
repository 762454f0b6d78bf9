"""Build generation settings that are exactly what is asked for, whatever the model's generation_config.json says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class ExactGenerationConfig(GenerationConfig):
    """Keep unset fields at transformers' defaults.

    `generate` of transformers 5 fills every unset field of the settings it is given from the model's
    generation_config.json: penalties, forbidden words, forced tokens, minimum lengths, beams. Most of these fields
    have no value that means "off", so this class refuses the filling instead.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any) -> dict[str, Any]:
        """Set the fields of `values`, except those that come from the model's file; return the unused ones.

        transformers passes the model's file with both flags, and its own defaults with `defaults_only` alone.
        """
        if defaults_only and allow_custom_entries:
            return {}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **values)


def greedy_generation_config(
    llm: PreTrainedModel,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    *,
    num_beams: int = 1,
    temperature: float = 0.0,
    **options: Any,
) -> ExactGenerationConfig:
    """Return settings for `llm.generate(generation_config=…)` that take the most likely token, until an end token.

    num_beams: more than 1 is the published decoding, beams with early stopping. temperature: above 0, sample from the
    whole vocabulary. options: further fields of GenerationConfig. Nothing is taken from the model's own settings.
    Raises ValueError without end tokens, or with one outside the vocabulary.
    """
    vocabulary = llm.get_input_embeddings().num_embeddings
    if not end_tokens or not all(0 <= token < vocabulary for token in end_tokens):
        raise ValueError(f"end tokens {list(end_tokens)}: expected at least one, each from 0 to {vocabulary - 1}")
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    values = {
        "do_sample": False,
        "num_beams": num_beams,
        "early_stopping": num_beams > 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(end_tokens),
        "pad_token_id": end_tokens[0],
        **sampled,
        **options,
    }
    return ExactGenerationConfig(**values)


def end_tokens(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids that end a caption: the tokenizer's first, then those of the model's generation settings.

    The same as `vlv.checkpoints.llm_folder.end_token_ids`, for a model in memory.
    """
    return join_end_tokens(tokenizer.eos_token_id, getattr(llm.generation_config, "eos_token_id", None))


def join_end_tokens(*sources: int | Sequence[int] | None) -> tuple[int, ...]:
    """Join end tokens given as None, an id or a list of ids; each id once, in the order given."""
    ids = [i for source in sources for i in ([] if source is None else [source] if isinstance(source, int) else source)]
    return tuple(dict.fromkeys(ids))


def cut_at_end(ids: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Return the tokens before the first end token, all of them where there is none."""
    return list(ids[: min((ids.index(token) for token in end_tokens if token in ids), default=len(ids))])
