"""Decide which images and captions are good enough to learn from, and say why others are not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

# a model that talks about itself or its task instead of the image
_REFUSAL = re.compile(
    r"\b(i['’]?m sorry|i apologi[sz]e|as an ai\b|i (?:can(?:no|['’])t|am unable to|am not able to|won['’]t)\b"
    r"|(?:cannot|unable to) (?:describe|process|see|view|assist|help)|no image (?:was|is|has been)|please provide)",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|here(?:['’]s| is| are))\b[^.:\n]{0,80}:\s*|^(?:caption|description)\s*:\s*",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"https?://|```|<[a-z/][^>]*>|^\s*(?:#{1,6} |[-*] )|\*\*", re.IGNORECASE | re.MULTILINE)


def _limit(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """The limits of what is kept.

    The image limits are all that the paper names (section 4.1, for training stability): a shorter side greater than
    512, an aspect ratio from 0.5 to 2, a watermark's probability less than 0.5. It names none for captions: theirs are
    ours, wide around its captions' 227 tokens (appendix A, figure 8: mostly 170 to 280).
    """

    min_side: int = _limit(513, "pixels of an image's shorter side, at least")
    max_aspect: float = _limit(2.0, "longer side over shorter side, at most; 0: any")
    max_watermark: float = _limit(0.5, "LAION's probability of a watermark, where a row has one, below")
    min_words: int = _limit(20, "words of a caption, at least")
    max_words: int = _limit(400, "words of a caption, at most")
    repetition: float = _limit(0.3, "share of a caption's runs of 4 words that it says again, at most")


def image_problem(width: int, height: int, about: dict, limits: Limits) -> str | None:
    """Return why an image is left out, None if it is not."""
    short, long = sorted((width, height))
    if short < limits.min_side:
        return f"small: {width} x {height}"
    if limits.max_aspect and long > limits.max_aspect * short:
        return f"aspect: {width} x {height}"
    watermark = about.get("pwatermark")
    if isinstance(watermark, int | float) and watermark >= limits.max_watermark:
        return f"watermark: {watermark:.2f}"
    return None


def tidy(caption: str, cut_off: bool) -> str:
    """Return a caption without an announcement, on one line; one that was cut off ends with its last full sentence."""
    text = re.sub(r"\s+", " ", _PREAMBLE.sub("", caption.strip())).strip().strip('"“”').strip()
    if cut_off and "." in text:
        text = text[: text.rindex(".") + 1]
    return text


def caption_problem(caption: str, cut_off: bool, limits: Limits) -> str | None:
    """Return why a tidied caption is left out, None if it is not."""
    words = caption.split()
    if not words:
        return "empty"
    if _REFUSAL.search(caption):
        return "refusal"
    if cut_off and not caption.endswith("."):
        return "cut off"
    if len(words) < limits.min_words:
        return f"short: {len(words)} words"
    if len(words) > limits.max_words:
        return f"long: {len(words)} words"
    if _MARKUP.search(caption):
        return "markup"
    if (share := repetition(words)) > limits.repetition:
        return f"repeated: {share:.0%}"
    return None


def repetition(words: list[str], length: int = 4) -> float:
    """Return the share of runs of `length` words that came before."""
    runs = [tuple(w.lower() for w in words[i : i + length]) for i in range(len(words) - length + 1)]
    return 1 - len(Counter(runs)) / len(runs) if runs else 0.0
