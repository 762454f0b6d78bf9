"""Build the record of an image: what every output, the server and Ray write about it."""

from __future__ import annotations

from collections.abc import Iterable

from serve.core.inputs import Item
from serve.core.style import CaptionStyle
from serve.engines.base import Completion
from vlv.model.captioner import clean_caption

PLAIN = CaptionStyle()


def distinct_texts(completions: Iterable[Completion], raw: bool, style: CaptionStyle = PLAIN) -> dict[str, Completion]:
    """Return the captions by their text, cleaned unless `raw` and edited by `style`; of equal texts the first."""
    texts: dict[str, Completion] = {}
    for completion in completions:
        text = completion.text if raw else clean_caption(completion.text)
        texts.setdefault(style.apply(text), completion)
    return texts


def caption_record(
    item: Item,
    completions: list[Completion],
    raw: bool,
    model_id: str,
    flags: str = "",
    style: CaptionStyle = PLAIN,
    timings: dict[str, float] | None = None,
) -> dict:
    """Return the record of a captioned image, with `captions` if several were drawn.

    `flags`: what changes captions beside the model, as on the command line; `timings`: seconds by stage.
    """
    texts = list(distinct_texts(completions, raw, style))
    return {
        **_source(item),
        "caption": texts[0],
        **({"captions": texts} if len(completions) > 1 else {}),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "finish_reason": completions[0].finish_reason,
        **({"timings": {stage: round(seconds, 4) for stage, seconds in timings.items()}} if timings else {}),
        "model": model_id,
        "flags": flags,
    }


def error_record(item: Item, kind: str, error: str) -> dict:
    """Return the record of an image that failed."""
    return {**_source(item), "kind": kind, "error": error}


def _source(item: Item) -> dict:
    return {"id": item.id, "path": item.path}
