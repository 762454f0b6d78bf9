"""Read the answers of language models: the last JSON object that has the expected fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence


def find_object(text: str, fields: Sequence[str]) -> dict:
    """Return the last JSON object in a text that has all fields, inside another object too; {} without one."""
    found = [o for o in objects(text) if all(f in o for f in fields)]
    return found[-1] if found else {}


def objects(text: str) -> Iterator[dict]:
    """Yield all JSON objects in a text, in the order in which they begin."""
    decoder = json.JSONDecoder()
    for brace in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, brace.start())
        except json.JSONDecodeError:
            continue
        yield value


def number(value: object) -> float | None:
    """Return a number as it is, None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
