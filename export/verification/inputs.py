"""Make the inputs that exports are verified and calibrated on: images and noise, and what the float32 model gives.

Each component gets inputs like those in use: the UNet gets noised latents of the images at an early, a middle and a
late step, with the keys and values of their contexts and of the empty prompt's context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from export.runtimes.torch import TorchRuntime
from vlv.checkpoints.folder import Checkpoint
from vlv.data import scenes
from vlv.data.image import ImageError, load_crop

NOISE = 2  # images of noise among the inputs
STEPS = (981.0, 501.0, 1.0)


class VerificationInputs:
    """Make the inputs of each component."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        count: int = 8,
        images: Sequence[Path] = (),
        seed: int = 0,
        reference: TorchRuntime | None = None,
    ):
        """count: images, the last NOISE of them noise; the others are `images`, followed by held-out scenes.

        reference: the checkpoint's float32 runtime, if it is open already.
        """
        self.reference = reference or TorchRuntime(checkpoint, "cpu")
        self.images = _images(checkpoint.config.image_size, count, images, seed)
        self.seed = seed
        drawn = max(0, count - NOISE - len(images))
        self.described = f"{min(len(images), count - NOISE)} photos, {drawn} scenes, {NOISE} noise"

    @torch.inference_mode()
    def inputs(self, component: str) -> list[dict[str, Tensor]]:
        """Return the inputs of a component: one or more sets, each with one row per image (two for the UNet)."""
        session = self.reference.session
        if component == "encoder":
            return [{"pixels": self.images}]
        if component == "text_encoder":
            return [{"ids": self._ids()}]
        if component == "vae_encoder":
            return [{"pixels": self._resized(session("vae_encoder").inputs[0].shape[-1])}]
        latents = session("vae_encoder")(**self.inputs("vae_encoder")[0])["latents"]
        if component == "vae_decoder":
            return [{"latents": latents}]
        context = self.reference.context(self.images)
        context = torch.cat([self.reference.empty_context().expand_as(context), context])
        if component == "context_kv":
            return [{"context": context}]
        kv = session("context_kv")(context=context)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.seed))
        return [
            {"latents": _noised(latents, noise, step).repeat(2, 1, 1, 1), "timestep": torch.tensor([step]), **kv}
            for step in STEPS
        ]

    def single(self, component: str) -> Iterator[dict[str, Tensor]]:
        """Yield the same inputs, one image at a time, for a model too large for a batch."""
        batched = {port.name for port in self.reference.session(component).inputs if port.batched}
        for inputs in self.inputs(component):
            for i in range(len(self.images)):
                # an image's rows are apart: all unconditional rows come first
                rows = slice(i, None, len(self.images))
                yield {name: value[rows] if name in batched else value for name, value in inputs.items()}

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the images."""
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def _ids(self) -> Tensor:
        """Return token ids, int32 [B, N], of random prompts; the first is the empty prompt."""
        empty = torch.tensor(self.reference.sampling["empty_ids"], dtype=torch.int32)
        generator = torch.Generator().manual_seed(self.seed)
        rows = [empty]
        for length in range(1, len(self.images)):
            row = empty.clone()
            words = torch.randint(0, int(empty.max()) - 1, (min(length, len(row) - 2),), generator=generator)
            row[1 : 1 + len(words)] = words.int()
            rows.append(row)
        return torch.stack(rows)

    def _resized(self, size: int) -> Tensor:
        if self.images.shape[-1] == size:
            return self.images
        resized = torch.nn.functional.interpolate(self.images.float(), (size, size), mode="bilinear")
        return resized.round().to(torch.uint8)


def _noised(latents: Tensor, noise: Tensor, step: float) -> Tensor:
    """Mix latents and noise in about the shares of a step, at unit variance."""
    share = step / 1000
    return (1 - share) ** 0.5 * latents + share**0.5 * noise


def _images(size: int, count: int, images: Sequence[Path], seed: int) -> Tensor:
    """Return uint8 [count, 3, size, size]. Raises ValueError or ImageError."""
    if count <= NOISE:
        raise ValueError(f"{count} images: expected at least {NOISE + 1}, since {NOISE} of them are noise")
    crops = [_photo(path, size) for path in images[: count - NOISE]]
    crops += [_scene(size, 1000 * (seed + 1) + i) for i in range(count - NOISE - len(crops))]
    random = np.random.default_rng(seed)
    crops += list(random.integers(0, 256, (NOISE, 3, size, size), np.uint8))
    return torch.from_numpy(np.stack(crops))


def scene_images(size: int, seed: int, first: int, count: int) -> Tensor:
    """Return uint8 [count, 3, size, size]: held-out scenes, others than those of any VerificationInputs."""
    return torch.from_numpy(np.stack([_scene(size, number) for number in scene_numbers(seed, first, count)]))


def scene_numbers(seed: int, first: int, count: int) -> range:
    """Return the numbers of the scenes of `scene_images`, counted from `scenes.HELD_OUT`."""
    return range(10**6 * (seed + 1) + first, 10**6 * (seed + 1) + first + count)


def border_images(size: int) -> Tensor:
    """Return uint8 [4, 3, size, size] with content at the borders: a frame of one pixel in white and in black on the
    opposite, corners of four colours, a checkerboard.
    """
    frame = torch.zeros(3, size, size, dtype=torch.uint8)
    frame[:, [0, -1]] = frame[:, :, [0, -1]] = 255
    corners = torch.zeros_like(frame)
    corners[0, 0, 0] = corners[1, 0, -1] = corners[2, -1, 0] = 255
    corners[:, -1, -1] = 255
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    board = ((y + x) % 2 * 255).to(torch.uint8).expand(3, -1, -1)
    return torch.stack([frame, 255 - frame, corners, board])


def _scene(size: int, number: int) -> np.ndarray:
    """Return a held-out scene, uint8 [3, size, size]."""
    scene = Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + number)))
    return np.asarray(scene.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _photo(path: Path, size: int) -> np.ndarray:
    try:
        return load_crop(path, size)
    except ImageError as error:
        raise ImageError(error.kind, f"{path}: {error}") from error
