"""Read the answers of language models: JSON objects in any text, and short answers with markup."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence

_DECODER = json.JSONDecoder()
_MARKUP = [
    (re.compile(r"\\boxed\{([^{}]*)\}"), r"\1"),
    (re.compile(r"</?[a-z]+/?>", re.IGNORECASE), " "),
    (re.compile(r"^\s*(?:#{1,6}|>|[-*+])\s+"), ""),  # heading, quotation, list
    (re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`+)(?=\S)(.+?)(?<=\S)\1(?!\w)"), r"\2"),  # emphasis, code
    (re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is\b\s*:?|:)", re.IGNORECASE), ""),
]
_QUOTED = re.compile(r"""^(["'“‘«])(.*)(["'”’»])[.]?$""")
_INITIALS = re.compile(r"(?:\b\w\.){2,}$")


def find_object(text: str, fields: Sequence[str]) -> dict:
    """Return the last JSON object in a text that has all fields, with those alone; {} without one.

    Objects inside others count; names of fields are compared without their case.
    """
    for found in reversed(list(objects(text))):
        lower = {str(name).strip().lower(): value for name, value in found.items()}
        if all(name in lower for name in fields):
            return {name: lower[name] for name in fields}
    return {}


def objects(text: str) -> Iterator[dict]:
    """Yield all objects in a text, in the order in which they begin: JSON, or as Python writes them.

    The latter have single quotes or a comma before the brace.
    """
    for brace in re.finditer(r"\{", text):
        start = brace.start()
        try:
            value, _ = _DECODER.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            value = _literal(text[start:])
        if isinstance(value, dict):
            yield value


def _literal(text: str) -> object:
    """Return the Python literal of the shortest beginning of a text with balanced braces; None for any other text."""
    depth = 0
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            try:
                return ast.literal_eval(text[: match.end()])
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                return None
    return None


def number(value: object) -> float | None:
    """Return a grade as a number: 4, "4", or {"score": 4, "reason": "..."}; None for anything else."""
    if isinstance(value, dict):
        inner = [number(v) for k, v in value.items() if str(k).lower() in ("score", "grade", "value", "rating")]
        return inner[0] if len(inner) == 1 else None
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        value = float(value)
        return int(value) if value.is_integer() else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def short_answer(text: str) -> str:
    """Return the first line with text in lower case, without markup, quotes around it, "Answer:" and a last period.

    Returns "" where there is no text.
    """
    for line in text.splitlines():
        plain = line
        for pattern, replacement in _MARKUP:
            plain = pattern.sub(replacement, plain).strip()
        for _ in range(2):  # quotes may enclose the period, or follow it
            plain = _QUOTED.sub(r"\2", plain).strip()
            plain = plain if _INITIALS.search(plain) else plain.rstrip(".")
        if plain:
            return " ".join(plain.lower().split())
    return ""
