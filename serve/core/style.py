"""Edit captions into the form that a data set wants: shorter, without an opener, around a trigger word."""

from __future__ import annotations

import re
from dataclasses import dataclass

# "The image shows", "In this photo, we can see", "This is a picture of"
OPENER = re.compile(
    r"""\s*(
        in\s+(the|this)\s+(image|picture|photo|photograph|scene)\s*,?\s+((we|you)\s+(can\s+)?see|there\s+(is|are))\s+ |
        (this|it)\s+is\s+(an?|the)\s+(image|picture|photo|photograph)\s+(of|showing)\s+ |
        (the|this)\s+(image|picture|photo|photograph|scene)\s+
        (shows|depicts|features|displays|portrays|captures|presents|illustrates|contains|includes|has|is\s+of)\s+
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class CaptionStyle:
    """How a caption is edited, in the order of the fields."""

    strip_openers: bool = False  # "The image shows a cat." becomes "A cat."
    max_sentences: int | None = None
    max_words: int | None = None  # whole sentences that fit, or the beginning of the first one
    single_line: bool = False  # line breaks become spaces
    template: str = "{caption}"  # such as "a sks photo, {caption}"

    def apply(self, text: str) -> str:
        """Return the edited caption."""
        if self.strip_openers and (found := OPENER.match(text)):
            text = text[found.end() :]
            text = text[:1].upper() + text[1:]
        if self.max_sentences or self.max_words:
            text = self._shortened(text)
        if self.single_line:
            text = " ".join(text.split())
        return self.template.replace("{caption}", text)

    def _shortened(self, text: str) -> str:
        sentences = re.split(r"(?<=[.!?])\s+", text.strip())[: self.max_sentences]
        if not self.max_words:
            return " ".join(sentences)
        kept: list[str] = []
        for sentence in sentences:
            if sum(len(one.split()) for one in [*kept, sentence]) > self.max_words:
                break
            kept.append(sentence)
        return " ".join(kept) or " ".join(sentences[0].split()[: self.max_words]).rstrip(",;:")
