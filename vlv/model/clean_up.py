"""Clean the text of a caption. Light: neither torch nor transformers is imported."""

from __future__ import annotations

import re


def clean_caption(text: str) -> str:
    """Clean a caption as published: cut it at the last period, drop repeated sentences.

    A text without a period is returned stripped.
    """
    text = text.strip()
    if "." in text:
        text = text[: text.rindex(".") + 1]
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return " ".join(dict.fromkeys(sentences))
