"""Tell what --ckpt may name: a path, or a model of the Hugging Face hub. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_id(name: str) -> bool:
    """Return True if `name` has the form owner/model and is no existing path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def missing_reason(name: str | Path) -> str | None:
    """Return why there can be no checkpoint of this name: it is neither a path that exists nor a hub id; else None."""
    if Path(name).exists() or is_hub_id(str(name)):
        return None
    return f"no checkpoint at {name}: expected a folder with vlv.json, published weights, or a hub id (owner/model)"
