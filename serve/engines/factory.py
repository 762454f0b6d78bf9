"""Choose an engine by its word; only the module of the chosen one is imported."""

from __future__ import annotations

from importlib import import_module

from serve import ENGINES
from serve.engines.base import LLMEngine

CLASSES = {
    "vllm": "VLLMEngine",
    "transformers": "TransformersEngine",
    "llamacpp": "LlamaCppEngine",
    "remote": "RemoteEngine",
}


def engine_class(word: str) -> type[LLMEngine]:
    """Return the engine class of one of serve.ENGINES. Raises ValueError for another word."""
    if word not in ENGINES:
        raise ValueError(f"expected an engine of {', '.join(ENGINES)}, got {word!r}")
    return getattr(import_module(f"serve.engines.{word}"), CLASSES[word])
