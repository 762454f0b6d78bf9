"""Feature nets from local folders: uint8 images in, one vector an image out. Needs no torchvision.

A net is a transformers folder (CLIP, SigLIP, DINOv2, ResNet ...; with its preprocessor_config.json), or the
TorchScript file `inception-2015-12-05.pt` of the published FID.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from vlv.common.command import hush
from vlv.evaluate.results import EvaluationError

INCEPTION_SIDE = 299


class FeatureNet:
    """Maps images uint8 [B, 3, H, W] to features float32 [B, D], on the CPU."""

    def __init__(self, path: Path, device: str = "cpu"):
        """Load a folder or a TorchScript file. Raises EvaluationError."""
        self.device = device
        if path.is_file():
            try:
                self.model = torch.jit.load(path, map_location=device).eval()
            except RuntimeError as error:
                raise EvaluationError(f"{path} is no TorchScript file: expected inception-2015-12-05.pt") from error
            if not hasattr(self.model, "layers"):
                raise EvaluationError(f"{path} has no `layers`: it is not inception-2015-12-05.pt")
            self._forward = self._inception
        elif (path / "config.json").is_file():
            hush()
            try:
                # Pillow on every machine, so that figures do not depend on whether torchvision is there
                self.processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
            except OSError as error:
                raise EvaluationError(
                    f"{path} has no usable preprocessor_config.json: copy it from the model"
                ) from error
            self.model = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval().to(device)
            self._forward = self._transformer
        else:
            raise EvaluationError(f"{path} is neither a transformers folder (config.json) nor a TorchScript file")

    @torch.inference_mode()
    def __call__(self, images: Tensor, batch: int = 64) -> Tensor:
        """Return the features of images uint8 [N, 3, H, W]: float32 [N, D]. Raises EvaluationError if not finite."""
        features = torch.cat([self._forward(part).flatten(1).float().cpu() for part in images.split(batch)])
        if not features.isfinite().all():
            raise EvaluationError("the feature net gives values that are not finite: are its weights complete?")
        return features

    def _transformer(self, images: Tensor) -> Tensor:
        files = [Image.fromarray(p) for p in images.permute(0, 2, 3, 1).numpy()]
        pixels = self.processor(images=files, return_tensors="pt")["pixel_values"].to(self.device)
        if hasattr(self.model, "get_image_features"):  # CLIP and SigLIP: the space that they share with text
            out = self.model.get_image_features(pixel_values=pixels)
            return out if isinstance(out, Tensor) else out.pooler_output
        out = self.model(pixel_values=pixels)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if pooled is None else pooled

    def _inception(self, images: Tensor) -> Tensor:
        """Run the FID network on images resized as clean-fid does: each channel as floats, antialiased, not rounded."""
        resized = [[_resized(channel) for channel in image] for image in images.numpy()]
        pixels = torch.from_numpy(np.array(resized, np.float32)).clamp(0, 255).to(self.device)
        return self.model.layers((pixels - 128) / 128)


def _resized(channel: np.ndarray) -> np.ndarray:
    image = Image.fromarray(channel.astype(np.float32))
    return np.asarray(image.resize((INCEPTION_SIDE, INCEPTION_SIDE), Image.Resampling.BICUBIC))
