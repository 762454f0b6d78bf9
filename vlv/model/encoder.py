"""Define the VLV encoder: from an image to the embeddings that caption or reconstruct it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.upsample_normalize import bicubic_matrix, upsample_normalize
from vlv.model.bottleneck import Bottleneck
from vlv.model.config import VLVConfig
from vlv.model.davit import DaViT

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFeatures(nn.Module):
    """Map tower features [B, H, W, C] to [B, 1 + H*W, width]: positions, a mean token, projection, norm.

    Source: Florence-2, modeling_florence2.py: _encode_image (one frame, so one temporal embedding).
    """

    temporal: Tensor

    def __init__(self, config: VLVConfig):
        super().__init__()
        channels, count = config.vision.dims[-1], config.image_positions
        self.columns = nn.Parameter(torch.randn(count, channels - channels // 2) * 0.02)
        self.rows = nn.Parameter(torch.randn(count, channels // 2) * 0.02)
        # the published table's first entry: sin(0), cos(0), interleaved
        self.register_buffer("temporal", torch.tensor([0.0, 1.0]).repeat(channels // 2 + 1)[:channels].contiguous())
        self.projection = nn.Linear(channels, config.width, bias=False)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        columns = self.columns[:w].expand(h, -1, -1)
        rows = self.rows[:h, None].expand(-1, w, -1)
        x = (x + torch.cat([columns, rows], dim=-1)).flatten(1, 2) + self.temporal
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        return self.norm(self.projection(x))


class VLVEncoder(nn.Module):
    """Map RGB crops uint8 [B, 3, S, S] to context [B, queries, context_width] and prompts [B, queries, llm_width]."""

    def __init__(self, config: VLVConfig):
        super().__init__()
        self.config = config
        # derived from the configuration, so no checkpoint carries them
        for name in ("mean", "std", "resize"):
            self.register_buffer(name, None, persistent=False)
        self.init_buffers()
        self.vision = DaViT(config.vision)
        self.image = ImageFeatures(config)
        self.bottleneck = Bottleneck(config)
        self.to_llm = (
            nn.Sequential(
                nn.Linear(config.context_width, config.llm_width),
                nn.GELU(),
                nn.Linear(config.llm_width, config.llm_width),
            )
            if config.llm_width
            else None
        )

    def init_buffers(self) -> None:
        """Compute the constants of the preprocessing; called again after loading into a meta-device module."""
        size, device = self.config.image_size, torch.get_default_device()
        self.mean = torch.tensor(IMAGENET_MEAN, device=device)
        self.std = torch.tensor(IMAGENET_STD, device=device)
        self.resize = bicubic_matrix(size, size * self.config.upsample).to(device)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.bottleneck.queries.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.bottleneck.queries.device

    def features(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [B, 3, S, S] to image features [B, 1 + tokens, width]. Raises ValueError on another input."""
        size = self.config.image_size
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(
                f"the encoder takes uint8 images [B, 3, {size}, {size}], not {pixels.dtype} {list(pixels.shape)}"
            )
        x = upsample_normalize(pixels, self.resize.float(), self.mean.float(), self.std.float(), self.dtype)
        return self.image(self.vision(x))

    def context(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [B, 3, S, S] to the context of the text-to-image model [B, queries, context_width]."""
        return self.bottleneck(self.features(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [B, 3, S, S] to prompt embeddings [B, queries, llm_width]."""
        return self.prompts(self.context(pixels))

    def prompts(self, context: Tensor) -> Tensor:
        """Project a context [..., queries, context_width] to prompt embeddings [..., queries, llm_width]."""
        if self.to_llm is None:
            raise ValueError("this encoder has no projection to a language model: it is a stage-1 checkpoint")
        return self.to_llm(context)
