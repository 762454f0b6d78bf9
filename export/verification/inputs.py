"""Inputs that exports are checked and calibrated on: pictures and noise, and what the float32 model makes of them.

Each component sees what it will see in use: the UNet gets noised latents of the pictures at an early, a middle and a
late step, with the keys and values of their contexts and of the empty prompt's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from export.runtimes.base import TorchRuntime
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import ImageError, load_crop

NOISE = 2  # of the pictures, how many are noise
STEPS = (981.0, 501.0, 1.0)


class VerificationInputs:
    """Inputs by component, made when first asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        count: int = 8,
        images: Sequence[Path] = (),
        seed: int = 0,
        reference: TorchRuntime | None = None,
    ):
        """count pictures, the last NOISE of them noise; the others are `images`, and held-out scenes after them.

        reference: the checkpoint's, where it has been opened already.
        """
        self.reference = reference or TorchRuntime(checkpoint, "cpu")
        self.pictures = _pictures(checkpoint.config.image_size, count, images, seed)
        self.seed = seed
        scenes = max(0, count - NOISE - len(images))
        self.described = f"{min(len(images), count - NOISE)} photos, {scenes} scenes, {NOISE} noise"

    @torch.inference_mode()
    def inputs(self, component: str) -> list[dict[str, Tensor]]:
        """Inputs of a component: one or more sets, each with a row (for the UNet: two) a picture."""
        session = self.reference.session
        if component == "encoder":
            return [{"pixels": self.pictures}]
        if component == "text_encoder":
            return [{"ids": self._ids()}]
        if component == "vae_encoder":
            return [{"pixels": self._resized(session("vae_encoder").inputs[0].shape[-1])}]
        latents = session("vae_encoder")(**self.inputs("vae_encoder")[0])["latents"]
        if component == "vae_decoder":
            return [{"latents": latents}]
        context = self.reference.context(self.pictures)
        context = torch.cat([self.reference._empty_context().expand_as(context), context])
        if component == "context_kv":
            return [{"context": context}]
        kv = session("context_kv")(context=context)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.seed))
        return [
            {"latents": _noised(latents, noise, step).repeat(2, 1, 1, 1), "timestep": torch.tensor([step]), **kv}
            for step in STEPS
        ]

    def single(self, component: str) -> Iterator[dict[str, Tensor]]:
        """The same inputs, those of one picture at a time: a large model takes no large batch."""
        batched = {port.name for port in self.reference.session(component).inputs if port.batched}
        for inputs in self.inputs(component):
            for i in range(len(self.pictures)):
                # the rows of a picture lie apart: all unconditional ones come first
                mine = slice(i, None, len(self.pictures))
                yield {name: value[mine] if name in batched else value for name, value in inputs.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the pictures."""
        return hashlib.sha256(self.pictures.numpy().tobytes()).hexdigest()

    def _ids(self) -> Tensor:
        """Token ids int32 [B, N] of made-up prompts; the first is the empty one."""
        empty = torch.tensor(self.reference.sampling["empty_ids"], dtype=torch.int32)
        generator = torch.Generator().manual_seed(self.seed)
        rows = [empty]
        for length in range(1, len(self.pictures)):
            row = empty.clone()
            words = torch.randint(0, int(empty.max()) - 1, (min(length, len(row) - 2),), generator=generator)
            row[1 : 1 + len(words)] = words.int()
            rows.append(row)
        return torch.stack(rows)

    def _resized(self, size: int) -> Tensor:
        if self.pictures.shape[-1] == size:
            return self.pictures
        resized = torch.nn.functional.interpolate(self.pictures.float(), (size, size), mode="bilinear")
        return resized.round().to(torch.uint8)


def _noised(latents: Tensor, noise: Tensor, step: float) -> Tensor:
    """Signal and noise in about the shares that a step has, at unit variance."""
    share = step / 1000
    return (1 - share) ** 0.5 * latents + share**0.5 * noise


def _pictures(size: int, count: int, images: Sequence[Path], seed: int) -> Tensor:
    """uint8 [count, 3, size, size]."""
    from vlv.data import scenes

    if count <= NOISE:
        raise ValueError(f"{count} pictures: at least {NOISE + 1}, since {NOISE} of them are noise")
    crops = [_photo(path, size) for path in images[: count - NOISE]]
    for i in range(count - NOISE - len(crops)):
        scene = Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + 1000 * (seed + 1) + i)))
        crops.append(np.asarray(scene.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1))
    random = np.random.default_rng(seed)
    crops += list(random.integers(0, 256, (NOISE, 3, size, size), np.uint8))
    return torch.from_numpy(np.stack(crops))


def _photo(path: Path, size: int) -> np.ndarray:
    try:
        return load_crop(path, size)
    except ImageError as error:
        raise ImageError(error.kind, f"{path}: {error}") from error
