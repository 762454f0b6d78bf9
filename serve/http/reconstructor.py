"""Reconstruct images from embeddings for a server; the text-to-image model is loaded at the first request.

    service = ReconstructionService(checkpoint)
    result = await service.reconstruct(crops, ReconstructionParams(guidance=2.0))   # one crop, or two to mix
    result.png, result.prompts             # the image file, and embeddings [queries, llm_width]

One image is reconstructed at a time, in a thread. The text-to-image model needs the encoder's context, which the
captions' encoder does not return, so that this service has an encoder of its own.
"""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from serve.http.errors import ApiError, invalid_request
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.data.image import png

if TYPE_CHECKING:
    from vlv.diffusion.reconstruction import TorchReconstructor

MIXES = ("blend", "splice")
MAX_WAITING = 16  # reconstructions that may wait for the one that is being computed
LIMITS = {"steps": (1, 100, int), "guidance": (1, 20, float), "seed": (0, 2**32 - 1, int), "share": (0, 1, float)}


@dataclass(frozen=True)
class ReconstructionParams:
    """How an image is reconstructed, and how two images are mixed."""

    steps: int = 50
    guidance: float = 2.0  # classifier-free; 1 turns it off
    seed: int = 0  # of the initial noise
    share: float = 0.5  # of the second image: 0 is the first, 1 the second
    mix: str = "blend"  # "blend": interpolate the embeddings; "splice": tokens of the first, then of the second

    @classmethod
    def from_body(cls, body: dict) -> ReconstructionParams:
        """Read a request's fields. Raises ApiError."""
        names = cls.__dataclass_fields__
        if unknown := sorted(body.keys() - names.keys() - {"model", "images"}):
            raise invalid_request(f"{unknown[0]} is not supported here: a reconstruction takes {', '.join(names)}")
        params = cls(**{name: body[name] for name in names if body.get(name) is not None})
        for name, (low, high, kind) in LIMITS.items():
            value, types = getattr(params, name), int if kind is int else int | float
            if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
                what = "an integer" if kind is int else "a number"
                raise invalid_request(f"{name} must be {what} from {low} to {high}, not {repr(value)[:40]}")
        if params.mix not in MIXES:
            raise invalid_request(f"mix must be {' or '.join(MIXES)}, not {repr(params.mix)[:40]}")
        return params


@dataclass(frozen=True)
class Reconstruction:
    """A PNG file, and the prompt embeddings [queries, llm_width] it was reconstructed from."""

    png: bytes
    prompts: Tensor


class ReconstructionService:
    """Reconstruct for one server, one image at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._thread = ThreadPoolExecutor(1, "reconstructor")
        self._waiting = 0
        self._reconstructor: TorchReconstructor | None = None

    @property
    def unavailable_reason(self) -> str:
        """Return why this server cannot reconstruct; empty if it can."""
        try:
            _ = self.checkpoint.t2i
        except CheckpointError:
            return "this checkpoint has no text-to-image model (t2i/)"
        return "" if importlib.util.find_spec("diffusers") else "diffusers is not installed: pip install diffusers"

    async def reconstruct(self, crops: list[np.ndarray], params: ReconstructionParams) -> Reconstruction:
        """Reconstruct one crop, or the mixture of two, from embeddings. crops: uint8 [3, S, S]. Raises ApiError."""
        if self.unavailable_reason:
            raise ApiError(501, "no_reconstruction", self.unavailable_reason)
        if self._waiting > MAX_WAITING:
            raise ApiError(503, "overloaded", f"{self._waiting} reconstructions are waiting already", 5)
        self._waiting += 1
        try:
            # a request that ends before its turn is dropped by the executor
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, crops, params)
        finally:
            self._waiting -= 1

    def _run(self, crops: list[np.ndarray], params: ReconstructionParams) -> Reconstruction:
        from vlv.diffusion.reconstruction import TorchReconstructor, mix  # needs diffusers, which is optional

        try:
            model = self._reconstructor = self._reconstructor or TorchReconstructor.of(self.checkpoint)
            with torch.inference_mode():
                contexts = model.context(torch.from_numpy(np.stack(crops)))
                context = contexts[0]
                if len(contexts) == 2 and params.mix == "blend":
                    context = torch.lerp(contexts[0], contexts[1], params.share)
                elif len(contexts) == 2:
                    context = mix(contexts[0], contexts[1], 1 - params.share)
                image = model.reconstruct(context[None], params.steps, params.guidance, params.seed)[0]
                prompts = model.encoder.prompts(context).cpu()
        except torch.OutOfMemoryError as error:
            raise ApiError(503, "no_memory", "the device has no memory left for the text-to-image model") from error
        return Reconstruction(png(image.cpu().numpy()), prompts)
