"""Draws a set of pictures into a folder, a batch at a time, and goes on where an earlier run stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlv.common.command import say
from vlv.common.files import atomic_write
from vlv.data.image import png
from vlv.diffusion.reconstruction import CaptionReconstructor, TorchReconstructor

# a part of the set -> its pictures, uint8 [B, 3, S, S]
Draw = Callable[[slice], Tensor]


def draw_all(folder: Path, names: list[str], batch: int, settings: dict, draw: Draw) -> None:
    """Draw the pictures of `names` that `folder` does not hold yet: NAME.png.

    Batches are cut at the same places every time, so a picture does not depend on where a run stopped. Raises
    ValueError where the folder's pictures were made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise ValueError(f"{folder} holds pictures of other settings (see {note}): remove it, or choose another --work")
    note.write_text(json.dumps(settings, indent=1) + "\n")
    for i in range(0, len(names), batch):
        part = slice(i, i + batch)
        files = [folder / f"{name}.png" for name in names[part]]
        if all(f.exists() for f in files):
            continue
        say(f"drawing {i} of {len(names)} into {folder}")
        for file, picture in zip(files, draw(part).cpu().numpy(), strict=True):
            with atomic_write(file) as path:
                path.write_bytes(png(picture))


def read(files: list[Path], size: int | None = None) -> Tensor:
    """Pictures uint8 [B, 3, S, S] as they are, all of one size. Raises ValueError where one is not."""
    pictures = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no {file}: every original needs its drawing, of the same name")
        pictures.append(np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1))
        side = size or pictures[0].shape[1]
        if pictures[-1].shape[1:] != (side, side):
            raise ValueError(f"{file} is {pictures[-1].shape[2]} x {pictures[-1].shape[1]}, not {side} x {side} pixels")
    return torch.from_numpy(np.stack(pictures))


def from_images(folder: Path, encoder, crops: Draw, device: str):
    """Draw from the embeddings of crops uint8 [B, 3, S, S]: draw(part, mixed, steps, guidance, seed, sampler).

    `mixed`: each token is another image's, by turns within the batch; what is left then is what chance gives.
    """
    drawer = TorchReconstructor(encoder, folder, device)

    @torch.inference_mode()
    def draw(part: slice, mixed: bool, seed: int, **options) -> Tensor:
        context = drawer.context(crops(part))
        if mixed:
            if len(context) < 2:
                raise ValueError("--shuffled mixes the images of a batch, and the last has only one: change --batch")
            context = torch.stack([context[:, i].roll(i, 0) for i in range(context.shape[1])], dim=1)
        return drawer.reconstruct(context, seed=seeds(seed, part, len(context)), **options)

    return draw


def from_captions(folder: Path, captions: list[str], device: str):
    """Draw from captions with any diffusers text-to-image folder: draw(part, mixed, steps, guidance, seed, sampler)."""
    drawer = CaptionReconstructor(folder, device)

    def draw(part: slice, mixed: bool, seed: int, **options) -> Tensor:
        texts = captions[part]
        return drawer.reconstruct(texts, seed=seeds(seed, part, len(texts)), **options)

    return draw


def seeds(first: int, part: slice, count: int) -> list[int]:
    """Each picture of the set has its own: from one noise for all, the set would vary less than what it stands for."""
    return [first + part.start + i for i in range(count)]
