"""Describe a run of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlv.common.openai_config import ClientConfig
from vlv.distill.quality import Limits

# asks for what the paper's asks for (appendix A, figure 7), in words of our own
PROMPT = (
    "Describe this image in one paragraph of plain text, in full detail, for someone who has to paint it without "
    "having seen it: the scene and its background; the objects, their number, colours, textures and positions relative "
    "to each other; people and animals with their looks, clothes, expressions, poses and what they do; light and "
    "shadows; style and mood. State only what can be seen. Do not start with a phrase like 'The image shows'."
)


@dataclass(frozen=True)
class DistillConfig:
    """What is asked, of which images, and where the answers go.

    size: pixels of the centre crop that is sent, 0 for the file itself; license, source: of images whose row names
    none; near: bits of 64 in which near-identical images may differ.
    """

    client: ClientConfig
    output: Path
    prompt: str = PROMPT
    max_tokens: int = 400
    size: int = 768
    license: str = "unknown"
    source: str = ""
    near: int = 3
    limits: Limits = field(default_factory=Limits)
