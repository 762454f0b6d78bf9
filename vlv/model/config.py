"""Define the sizes of the encoder, and the presets by name. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

ACTIVATIONS = ("gelu", "quick_gelu")
MAY_BE_0 = frozenset({"llm_width", "encoder_layers", "context_layers", "depths", "paddings"})
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

    def check(self) -> None:
        """Raise ValueError for sizes that no encoder can have, such as heads that do not divide the width."""
        vision = asdict(self.vision)
        numbers = [(name, value) for name, value in vision.items() if name != "window"]
        if len({len(stages) for _, stages in numbers}) != 1 or not self.vision.dims:
            raise ValueError("the stages of vision differ in number: expected one entry a stage in every list")
        numbers = [(name, value) for name, stages in numbers if name != "prenorm" for value in stages]
        numbers += [("window", self.vision.window), *((f.name, getattr(self, f.name)) for f in fields(self)[1:])]
        for name, value in numbers:
            least = 0 if name in MAY_BE_0 else 1
            if name != "context_activation" and (type(value) is not int or value < least):
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
        if self.context_activation not in ACTIVATIONS:
            raise ValueError(f"context_activation is {self.context_activation!r}, expected {' or '.join(ACTIVATIONS)}")
        widths = [*zip(self.vision.dims, self.vision.heads, strict=True), (self.width, self.heads)]
        widths += [*zip(self.vision.dims, self.vision.groups, strict=True), (self.context_width, self.context_heads)]
        for width, heads in widths:
            if width % heads:
                raise ValueError(f"a width of {width} does not divide into {heads} heads or groups")
        side = self.image_size * self.upsample
        for patch, stride, padding in zip(self.vision.patches, self.vision.strides, self.vision.paddings, strict=True):
            side = (side + 2 * padding - patch) // stride + 1
        if not 1 <= side <= self.image_positions:
            raise ValueError(f"image_size {self.image_size} makes {side} rows, expected 1 to {self.image_positions}")
        longest = max(1 + side**2 + self.prompt_tokens, self.queries)
        if longest > self.text_positions:
            raise ValueError(f"text_positions is {self.text_positions}, expected at least {longest}")


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
