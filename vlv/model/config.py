"""Define the sizes of the encoder, and the presets by name. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

FORMAT = 1  # of vlv.json; raised when an older reader would misread a folder


@dataclass(frozen=True)
class DaViTConfig:
    """Hold the sizes of the vision tower, one entry per stage. Defaults: Florence-2-large."""

    dims: tuple[int, ...] = (256, 512, 1024, 2048)
    heads: tuple[int, ...] = (8, 16, 32, 64)
    groups: tuple[int, ...] = (8, 16, 32, 64)
    depths: tuple[int, ...] = (1, 1, 9, 1)
    patches: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    paddings: tuple[int, ...] = (3, 1, 1, 1)
    prenorm: tuple[bool, ...] = (False, True, True, True)
    window: int = 12


@dataclass(frozen=True)
class VLVConfig:
    """Hold the sizes of the encoder. Defaults: the published model of Florence-2-large and SD 2.1-base."""

    vision: DaViTConfig = DaViTConfig()
    image_size: int = 384  # side of the uint8 crop
    upsample: int = 2  # bicubic, inside the model: the tower sees image_size * upsample
    image_positions: int = 50  # rows and columns of the learned 2-D position embedding
    width: int = 1024  # BART
    heads: int = 16
    ffn: int = 4096
    encoder_layers: int = 12
    decoder_layers: int = 12
    text_positions: int = 1024
    prompt_tokens: int = 14  # "Describe with a paragraph what is shown in the image."
    queries: int = 77
    context_width: int = 1024  # CLIP text model: the context of the UNet
    context_heads: int = 16
    context_ffn: int = 4096
    context_layers: int = 23
    context_activation: str = "gelu"  # or quick_gelu
    llm_width: int = 2048  # 0: no projection to a language model (stage 1)

    def to_dict(self) -> dict:
        """Return the fields as nested dicts, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> VLVConfig:
        """Rebuild from `to_dict`'s form (lists become tuples). Raises ValueError on unknown fields."""
        values = dict(values)
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model fields {unknown}; this version knows {[f.name for f in fields(cls)]}")
        vision = values.pop("vision", {})
        vision = {k: tuple(v) if isinstance(v, list) else v for k, v in vision.items()}
        return cls(vision=DaViTConfig(**vision), **values)


_PUBLISHED = VLVConfig()
PRESETS = {
    "tiny": VLVConfig(
        vision=DaViTConfig(
            dims=(64, 128, 192), heads=(2, 4, 6), groups=(2, 4, 6), depths=(1, 1, 1), patches=(8, 3, 3),
            strides=(8, 2, 2), paddings=(0, 1, 1), prenorm=(False, True, True), window=8,
        ),
        image_size=64, image_positions=8, width=128, heads=4, ffn=512, encoder_layers=2, decoder_layers=2,
        text_positions=96, prompt_tokens=4, queries=32, context_width=128, context_heads=4, context_ffn=512,
        context_layers=3, llm_width=128,
    ),
    "qwen2.5-0.5b": replace(_PUBLISHED, llm_width=896),
    "qwen2.5-1.5b": replace(_PUBLISHED, llm_width=1536),
    "qwen2.5-3b": _PUBLISHED,
}  # fmt: skip
