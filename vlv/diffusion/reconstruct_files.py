"""Reconstruct image files, or the captions of a JSONL file, into a folder of PNG files with an overview grid."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlv.common.command import Misuse, UserError, say
from vlv.common.files import atomic_write
from vlv.data.image import EXTENSIONS, ImageError, load_crop, png
from vlv.data.image_files import image_files
from vlv.diffusion.reconstruction import CaptionReconstructor, Reconstructor, interpolate, mix

COLUMNS = 8  # images a row of a grid without originals


class ReconstructionError(UserError, ValueError):
    """Raised where images cannot be reconstructed as asked."""


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; the defaults are the published ones."""

    steps: int = 50
    guidance: float = 2.0  # classifier-free guidance; 1 turns it off
    seed: int = 0  # of the initial noise, the same for every image
    sampler: str = "ddim"
    batch: int = 8  # images sampled together


def reconstruct_images(
    paths: Sequence[Path],
    image_size: int,
    open_reconstructor: Callable[[], Reconstructor],
    output: Path,
    sampling: Sampling,
    interpolation: int | None = None,
    mix_share: float | None = None,
) -> Path:
    """Reconstruct image files, or the files in folders, to `output`/NAME.png; return the path of the grid.

    interpolation: from two images, reconstruct this many contexts between them. mix_share: from two images,
    reconstruct one whose first tokens, of this share, are the first image's. The models are opened after all images
    have been read. Raises ImageError with the file's name, and ReconstructionError.
    """
    files = list(_files(paths))
    if interpolation:
        names = [f"between-{i}" for i in range(interpolation)]
    else:
        names = ["mix"] if mix_share is not None else unique_names([file.stem for file in files])
    given = {file.resolve() for file in files}
    if any((output / f"{name}.png").resolve() in given for name in [*names, "grid"]):
        raise Misuse(f"--output {output} would overwrite the images themselves: choose another folder")
    crops = [_crop(file, image_size) for file in files]
    reconstructor = open_reconstructor()
    stacks = [np.stack(crops[i : i + sampling.batch]) for i in range(0, len(crops), sampling.batch)]
    contexts = torch.cat([reconstructor.context(torch.from_numpy(stack)) for stack in stacks])
    if interpolation:
        contexts = interpolate(*contexts, interpolation)
    elif mix_share is not None:
        contexts = mix(*contexts, mix_share)[None]
    s = sampling
    images = _in_batches(
        contexts, s.batch, lambda batch: reconstructor.reconstruct(batch, s.steps, s.guidance, s.seed, s.sampler)
    )
    return _write(output, names, images, crops)


def reconstruct_captions(
    captions: Path, folder: Path, device: str | torch.device, output: Path, sampling: Sampling
) -> Path:
    """Generate `output`/NAME.png for the records of `captions` (JSONL with id and caption); return the grid's path.

    folder: any diffusers text-to-image folder. Raises ReconstructionError where a line is no such record.
    """
    with captions.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    if not records or not all("id" in r and "caption" in r for r in records):
        raise ReconstructionError(
            f"{captions} holds no records with an id and a caption, as serve.vllm_caption writes them"
        )
    reconstructor, s = CaptionReconstructor(folder, device), sampling
    images = _in_batches(
        [r["caption"] for r in records],
        s.batch,
        lambda batch: reconstructor.reconstruct(batch, s.steps, s.guidance, s.seed, s.sampler),
    )
    return _write(output, unique_names([Path(r["id"]).stem for r in records]), images, [])


def grid(images: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> np.ndarray:
    """Return an overview uint8 [3, H, W]: each original above its image; without originals, rows of COLUMNS images."""
    if len(originals) == len(images):
        return np.concatenate([np.concatenate(originals, 2), np.concatenate(images, 2)], 1)
    strip = [*originals[:1], *images, *originals[1:]]
    blank = np.full_like(strip[0], 255)
    columns = min(COLUMNS, len(strip)) if not originals else len(strip)
    strip += [blank] * (-len(strip) % columns)
    return np.concatenate([np.concatenate(strip[i : i + columns], 2) for i in range(0, len(strip), columns)], 1)


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names, with a number after repeated ones; "grid" is reserved for the overview."""
    taken = {"grid": None}
    for name in names:
        numbered = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        taken[next(n for n in numbered if n not in taken)] = None
    return list(taken)[1:]


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files of `paths`; a folder must hold an image. Raises ReconstructionError."""
    for path in paths:
        found = image_files([path])
        if not found:
            raise ReconstructionError(f"no images in {path}: looked for {' '.join(sorted(EXTENSIONS))}")
        yield from found


def _crop(file: Path, size: int) -> np.ndarray:
    """Return a file's crop uint8 [3, size, size]. Raises ImageError with the file's name."""
    try:
        return load_crop(file, size)
    except ImageError as error:
        raise ImageError(error.kind, f"{file}: {error}") from error


def _in_batches(inputs: Tensor | list[str], size: int, reconstruct: Callable[..., Tensor]) -> list[np.ndarray]:
    """Return the images uint8 [3, H, W] of all inputs, computed `size` at a time, with progress on stderr."""
    images: list[np.ndarray] = []
    for i in range(0, len(inputs), size):
        say(f"reconstructing {i} of {len(inputs)}")
        images.extend(reconstruct(inputs[i : i + size]).cpu().numpy())
    return images


def _write(output: Path, names: list[str], images: list[np.ndarray], originals: list[np.ndarray]) -> Path:
    """Write the images and their grid as PNG files; return the grid's path."""
    output.mkdir(parents=True, exist_ok=True)
    for name, image in [*zip(names, images, strict=True), ("grid", grid(images, originals))]:
        with atomic_write(output / f"{name}.png") as temporary:
            temporary.write_bytes(png(image))
    return output / "grid.png"
