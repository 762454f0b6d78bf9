"""Pictures drawn from embeddings, for a server: the checkpoint's text-to-image model, loaded when first asked for.

    painter = ReconstructionService(checkpoint)
    drawn = await painter.paint(crops, Drawing(guidance=2.0))    # one crop: its reconstruction; two: their mixture
    drawn.png, drawn.prompts                                     # the picture's file, embeddings [queries, llm_width]

One picture is drawn at a time, in a thread. A text-to-image model needs the encoder's context, which the captions'
encoder does not hand out, so the painter has an encoder of its own.
"""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.http.auth import ApiError
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.data.image import png

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vlv.diffusion.reconstruction import TorchReconstructor

MIXES = ("blend", "splice")
WAITING = 16  # drawings that may wait for the one that is being drawn


@dataclass(frozen=True)
class Drawing:
    """How a picture is drawn, and where between two pictures it lies."""

    steps: int = 50
    guidance: float = 2.0  # classifier-free; 1 turns it off
    seed: int = 0  # of the initial noise
    share: float = 0.5  # of the second picture: 0 is the first, 1 the second
    mix: str = "blend"  # "blend": the straight line between the two; "splice": tokens of the first, then of the second

    @classmethod
    def of(cls, body: dict) -> Drawing:
        """Read a request's fields. Raises ApiError."""
        known = {name: body[name] for name in cls.__dataclass_fields__ if body.get(name) is not None}
        drawing = cls(**known)
        if unknown := sorted(body.keys() - cls.__dataclass_fields__.keys() - {"model", "images"}):
            raise _no(f"{unknown[0]} is not supported here: a drawing takes {', '.join(cls.__dataclass_fields__)}")
        for name, low, high, kinds in (
            ("steps", 1, 100, int), ("guidance", 1, 20, int | float), ("seed", 0, 2**32 - 1, int),
            ("share", 0, 1, int | float),
        ):  # fmt: skip
            value = getattr(drawing, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "a whole number" if kinds is int else "a number"
                raise _no(f"{name} must be {what} from {low} to {high}, not {repr(value)[:40]}")
        if drawing.mix not in MIXES:
            raise _no(f"mix must be {' or '.join(MIXES)}, not {repr(drawing.mix)[:40]}")
        return drawing


@dataclass(frozen=True)
class Drawn:
    """A picture as a PNG file, and the prompt embeddings [queries, llm_width] of what it was drawn from."""

    png: bytes
    prompts: Tensor


class ReconstructionService:
    """Draws for one server, a picture at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._thread, self._waiting = ThreadPoolExecutor(1, "painter"), 0
        self._drawer: TorchReconstructor | None = None

    @property
    def unavailable_reason(self) -> str:
        """Why nothing can be drawn here; empty where it can."""
        try:
            _ = self.checkpoint.t2i
        except CheckpointError:
            return "this checkpoint has no text-to-image model (t2i/)"
        return "" if importlib.util.find_spec("diffusers") else "diffusers is not installed: pip install diffusers"

    async def paint(self, crops: list[np.ndarray], drawing: Drawing) -> Drawn:
        """One or two crops, uint8 [3, S, S] each -> what is drawn from their embeddings. Raises ApiError."""
        if self.unavailable_reason:
            raise ApiError(501, "no_drawing", self.unavailable_reason)
        if self._waiting > WAITING:
            raise ApiError(503, "overloaded", f"{self._waiting} pictures are being drawn already", 5)
        self._waiting += 1
        try:
            # where the request ends before its turn, the executor drops it
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._paint, crops, drawing)
        finally:
            self._waiting -= 1

    def _paint(self, crops: list[np.ndarray], drawing: Drawing) -> Drawn:
        import numpy as np
        import torch

        from vlv.diffusion.reconstruction import TorchReconstructor, mix

        try:
            drawer = self._drawer = self._drawer or TorchReconstructor.of(self.checkpoint)
            with torch.inference_mode():
                contexts = drawer.context(torch.from_numpy(np.stack(crops)))
                context = contexts[0]
                if len(contexts) == 2 and drawing.mix == "blend":
                    context = torch.lerp(contexts[0], contexts[1], drawing.share)
                elif len(contexts) == 2:
                    context = mix(contexts[0], contexts[1], 1 - drawing.share)
                picture = drawer.reconstruct(context[None], drawing.steps, drawing.guidance, drawing.seed)[0]
                prompts = drawer.encoder.prompts(context).cpu()
        except torch.OutOfMemoryError as error:
            raise ApiError(503, "no_memory", "the device has no memory left for the text-to-image model") from error
        return Drawn(png(picture.cpu().numpy()), prompts)


def _no(message: str) -> ApiError:
    return ApiError(400, "invalid_request", message)
