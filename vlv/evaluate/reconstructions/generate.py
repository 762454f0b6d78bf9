"""Generate a set of images into a folder, a batch at a time, and continue where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import say
from vlv.common.files import atomic_write, write_json
from vlv.data.image import ImageError, decode, load_crop, png
from vlv.diffusion.reconstruction import CaptionReconstructor, TorchReconstructor
from vlv.evaluate.results import EvaluationError


@dataclass(frozen=True)
class Settings:
    """How images are generated; each image of the set has its own noise, by `seed` plus its place in the set."""

    sampler: str
    steps: int
    seed: int
    batch: int


class ImageSet:
    """The generated images of a list of names, NAME.png in a folder for each guidance; subclasses generate a batch."""

    def __init__(self, names: list[str], settings: Settings, work: Path, origin: dict):
        """`origin`: what the images are generated from, for the record beside them."""
        self.names = names
        self.settings = settings
        self.work = work
        self.origin = origin

    def generate(self, part: slice, guidance: float, mixed: bool) -> Tensor:
        """Return the images of a part of the names, uint8 [B, 3, S, S]."""
        raise NotImplementedError

    def folder(self, guidance: float, mixed: bool = False) -> Path:
        """Return the complete folder of a set; what it lacks is generated.

        Batches are cut at the same places every time, so that an image does not depend on where a run stopped. Raises
        EvaluationError where the folder's images were made with other settings.
        """
        s = self.settings
        folder = self.work / f"{'mixed' if mixed else 'drawn'}-{guidance:g}"
        record = self.origin | {"sampler": s.sampler, "steps": s.steps, "seeds from": s.seed, "batch": s.batch}
        record |= {"names": self.names, "guidance": guidance}
        note = folder / "settings.json"
        if note.exists() and json.loads(note.read_text()) != record:
            raise EvaluationError(
                f"{folder} holds images of other settings (see {note}): remove it, or choose another --work"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(note, record, indent=1)
        for i in range(0, len(self.names), s.batch):
            part = slice(i, i + s.batch)
            files = [folder / f"{name}.png" for name in self.names[part]]
            if all(f.exists() for f in files):
                continue
            say(f"generating image {i} of {len(self.names)} into {folder}")
            for file, image in zip(files, self.generate(part, guidance, mixed).cpu().numpy(), strict=True):
                with atomic_write(file) as path:
                    path.write_bytes(png(image))
        return folder

    def _options(self, part: slice, guidance: float) -> dict:
        count = len(self.names[part])
        seeds = [self.settings.seed + part.start + i for i in range(count)]
        return {"steps": self.settings.steps, "guidance": guidance, "seed": seeds, "sampler": self.settings.sampler}


class FromImages(ImageSet):
    """Reconstructions from the embeddings of the originals."""

    def __init__(
        self, t2i: Path, checkpoint: Checkpoint, originals: dict[str, Path], device: str, settings: Settings, work: Path
    ):
        super().__init__(list(originals), settings, work, {"model": checkpoint.hash, "t2i": str(t2i)})
        self._files = list(originals.values())
        self._size = checkpoint.config.image_size
        self._reconstructor = TorchReconstructor(checkpoint.load_encoder(), t2i, device)

    @torch.inference_mode()
    def generate(self, part: slice, guidance: float, mixed: bool) -> Tensor:
        """`mixed`: each token is another image's of the batch, a control. Raises EvaluationError, ImageError."""
        context = self._reconstructor.context(crops(self._files[part], self._size))
        if mixed:
            if len(context) < 2:
                raise EvaluationError(
                    "--shuffled mixes the images of a batch, and the last has only one: change --batch"
                )
            context = torch.stack([context[:, i].roll(i, 0) for i in range(context.shape[1])], dim=1)
        return self._reconstructor.reconstruct(context, **self._options(part, guidance))


class FromCaptions(ImageSet):
    """Images generated from captions by any diffusers text-to-image folder."""

    def __init__(
        self,
        t2i: Path,
        captions: dict[str, str],
        device: str,
        settings: Settings,
        work: Path,
        checkpoint: Checkpoint | None = None,
    ):
        """`captions`: by image key; `checkpoint`: for the record only."""
        self._captions = list(captions.values())
        # the captions, not the file's name: the file may hold others later
        digest = hashlib.sha256(json.dumps(self._captions).encode()).hexdigest()[:12]
        origin = {"model": checkpoint.hash if checkpoint else None, "t2i": str(t2i), "captions": digest}
        super().__init__(list(captions), settings, work, origin)
        self._reconstructor = CaptionReconstructor(t2i, device)

    def generate(self, part: slice, guidance: float, mixed: bool) -> Tensor:
        return self._reconstructor.reconstruct(self._captions[part], **self._options(part, guidance))


def crops(files: list[Path], size: int) -> Tensor:
    """Return the centre crops of image files, uint8 [B, 3, size, size]. Raises ImageError with the file's name."""
    found = []
    for file in files:
        try:
            found.append(load_crop(file, size))
        except ImageError as error:
            raise ImageError(error.kind, f"{file}: {error}") from error
    return torch.from_numpy(np.stack(found))


def read_images(files: list[Path], size: int | None = None) -> Tensor:
    """Return generated images as they are, uint8 [B, 3, S, S], all of one size. Raises EvaluationError."""
    images = []
    for file in files:
        if not file.is_file():
            raise EvaluationError(f"there is no {file}: every original needs its reconstruction, of the same name")
        images.append(np.asarray(decode(file)).transpose(2, 0, 1))
        side = size or images[0].shape[1]
        if images[-1].shape[1:] != (side, side):
            height, width = images[-1].shape[1:]
            raise EvaluationError(f"{file} is {width} x {height}, not {side} x {side} pixels")
    return torch.from_numpy(np.stack(images))
