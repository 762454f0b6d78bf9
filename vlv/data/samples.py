"""One row of training data, and what is read as its image, caption and licence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

# names of columns and fields; the first that is there counts
IMAGE, CAPTION = ("image", "jpg", "png", "webp"), ("caption", "text", "txt")
# what else a row may tell of its image, for vlv.train.distill
ABOUT = ("license", "url", "source", "author", "copyright", "pwatermark")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: `image` is an image file's content, `about` its licence and so on where the data tell (ABOUT)."""

    id: str
    image: bytes
    caption: str | None = None
    about: dict = field(default_factory=dict)


class Source(Protocol):
    """Shards of rows. `rows` has the number of each shard's rows; the shards and their order never change."""

    rows: list[int]

    def name(self, shard: int, row: int) -> str | None:
        """A row's id if it is known without reading the row."""
        ...

    def read(self, shard: int, row: int) -> Sample: ...


def text_of(name: str, content: bytes) -> tuple[str | None, dict]:
    """The caption that a .txt or .json file beside an image holds, and what a .json tells of the image."""
    text = content.decode("utf-8", "replace").strip()
    if not name.endswith(".json"):
        return text or None, {}
    try:
        values = json.loads(text)
    except ValueError:
        return None, {}
    return (first_of(values, CAPTION), about(values)) if isinstance(values, dict) else (None, {})


def about(values: dict) -> dict:
    return {name: values[name] for name in ABOUT if values.get(name) is not None}


def first_of(values: dict, names: Sequence[str]):
    return next((values[n] for n in names if values.get(n) is not None), None)


def row_sample(values: dict, name: str) -> Sample:
    """A sample from a row with an image (bytes, or {"bytes": …}) and maybe a caption and an id."""
    image = first_of(values, IMAGE)
    image = image.get("bytes") if isinstance(image, dict) else image
    return Sample(str(values.get("id") or name), image or b"", first_of(values, CAPTION), about(values))
