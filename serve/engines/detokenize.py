"""Decode tokens to text, at once or as they come: complete characters only, up to an end token or a stop string."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character


def decode(tokenizer, ids: list[int]) -> str:
    """Return the text of ids, without the part of a character at which they end."""
    # transformers' own method, which for BPE returns the same, takes longer to look at every id than to decode it
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # a tokenizer written in Python has none
    return backend.decode(ids, skip_special_tokens=True).rstrip(REPLACEMENT)


class Detokenizer:
    """Decode one caption: `push` new ids and get the text that is certain; `ended` is True once it is complete.

    Text that may begin a stop string is held back until that is decided.
    """

    def __init__(self, tokenizer, ends: Collection[int], stop: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ends = ends
        self._stop = stop
        self._ids: list[int] = []
        self._decoded = ""  # of the ids, as far as their characters are complete
        self._held = ""  # the end of it, which may begin a stop string
        self.ended = False

    def push(self, ids: list[int]) -> tuple[str, list[int]]:
        """Return the text that the new ids make certain, and the ids that belong to the caption."""
        kept, pieces = [], []
        for token in ids:
            if self.ended:
                break
            if token in self._ends:
                pieces.append(self.rest())
                self.ended = True
            else:
                kept.append(token)
                self._ids.append(token)
                new = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
                self._decoded += new
                pieces.append(self._certain(new))
        return "".join(pieces), kept

    def rest(self) -> str:
        """Return the text that is held back, when no more ids will come."""
        text = decode(self._tokenizer, self._ids)
        # the stream waits for the rest of a character, also if complete ones are before it
        new = text[len(self._decoded) :] if text.startswith(self._decoded) else ""
        self._decoded += new
        text = self._certain(new)
        held, self._held = self._held, ""
        return text + held

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
