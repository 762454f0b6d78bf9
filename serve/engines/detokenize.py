"""Decode tokens to text as they come: complete characters only, up to the end token or a stop string."""

from __future__ import annotations


class Detokenizer:
    """Decode one caption: `push` new ids and get the text that is certain; `ended` is True once it is complete.

    Text that may begin a stop string is held back until that is decided.
    """

    def __init__(self, tokenizer, end: int | None, stop: tuple[str, ...] = ()):
        from tokenizers.decoders import DecodeStream

        self._step, self._tokenizer = DecodeStream(skip_special_tokens=True).step, tokenizer.backend_tokenizer
        self._end, self._stop, self._held = end, stop, ""
        self.ended = False

    def push(self, ids: list[int]) -> tuple[str, list[int]]:
        """Return the text that the new ids make certain, and the ids that belong to the caption."""
        kept, pieces = [], []
        for token in ids:
            if self.ended:
                break
            if token == self._end:
                self.ended = True
                pieces.append(self.rest())
            else:
                kept.append(token)
                pieces.append(self._certain(self._step(self._tokenizer, token) or ""))
        return "".join(pieces), kept

    def rest(self) -> str:
        """Return the text that is held back, when no more ids will come."""
        held, self._held = self._held, ""
        return held

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        doubtful = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - doubtful :]
        return text[: len(text) - doubtful]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
