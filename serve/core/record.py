"""Build the record of an image: what every output, the server and Ray write about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serve.core.inputs import Item
from serve.core.style import CaptionStyle
from serve.engines.sampling import Completion
from vlv.data.decoding.crop import Box
from vlv.model.clean_up import clean_caption

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
    crop: dict | None = None,
) -> dict:
    """Return the record of a captioned image, with `captions` if several were drawn.

    `flags`: what changes captions beside the model, as on the command line; `timings`: seconds by stage; `crop`: of
    `crop_fields`.
    """
    texts = list(distinct_texts(completions, raw, style))
    return {
        **_source(item),
        "caption": texts[0],
        **({"captions": texts} if len(completions) > 1 else {}),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "finish_reason": completions[0].finish_reason,
        **(crop or {}),
        **({"timings": {stage: round(seconds, 4) for stage, seconds in timings.items()}} if timings else {}),
        "model": model_id,
        "flags": flags,
    }


def joined(squares: Sequence[Completion], raw: bool) -> Completion:
    """Return the captions of an image's squares as one caption: their texts in order, cleaned unless `raw`.

    The clean-up of the result drops sentences that several squares have.
    """
    if len(squares) == 1:
        return squares[0]
    texts = [square.text if raw else clean_caption(square.text) for square in squares]
    if not raw:  # without a period the clean-up of the result would cut the last text off
        texts = [text if text.endswith(".") else f"{text}." for text in texts if text]
    logprobs = [square.logprobs for square in squares]
    return Completion(
        " ".join(texts),
        [token for square in squares for token in square.token_ids],
        "length" if any(square.finish_reason == "length" for square in squares) else "stop",
        None if None in logprobs else [token for part in logprobs if part is not None for token in part],
    )


def crop_fields(crop: str, boxes: Sequence[Box], squares: Sequence[Sequence[Completion]], raw: bool) -> dict:
    """Return the fields of a record that tell what the model saw, where that is not the centre.

    `boxes` and `squares`: of each square the part of the upright image, and its completions. Of tiles every square is
    listed with its captions.
    """
    if crop == "center":
        return {}
    if crop != "tiles":
        return {"crop": crop}
    tiles = []
    for box, completions in zip(boxes, squares, strict=True):
        texts = list(distinct_texts(completions, raw))
        tiles.append({"box": list(box), "caption": texts[0]} | ({"captions": texts} if len(completions) > 1 else {}))
    return {"crop": crop, "tiles": tiles}


def error_record(item: Item, kind: str, error: str) -> dict:
    """Return the record of an image that failed."""
    return {**_source(item), "kind": kind, "error": error}


def _source(item: Item) -> dict:
    return {"id": item.id, "path": item.path}
