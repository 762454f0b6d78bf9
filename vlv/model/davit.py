"""Define DaViT, the vision tower of Florence-2, channels last throughout.

Ding et al. 2022 (arXiv 2204.03645) as Florence-2 builds it: every stage embeds patches by a
convolution, then alternates attention between the tokens of a window and attention between the
channels of a group. Maps are [B, H, W, C].
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.add_norm import add_norm
from kernels.channel_attention import channel_attention
from kernels.dwconv_norm import adds_residual, dwconv_norm
from kernels.linear import Linear
from kernels.window_attention import window_attention
from vlv.model.config import DaViTConfig


class PatchEmbed(nn.Module):
    """Embed patches [B, H, W, C]: a strided convolution with a LayerNorm before it (`prenorm`) or after it."""

    def __init__(self, inputs: int, dim: int, patch: int, stride: int, padding: int, prenorm: bool):
        super().__init__()
        self.prenorm = prenorm
        self.conv = nn.Conv2d(inputs, dim, patch, stride, padding)
        self.norm = nn.LayerNorm(inputs if prenorm else dim)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Embed x, or x + residual."""
        if self.prenorm:
            x = self.norm(x) if residual is None else add_norm(x, residual, self.norm, keep_sum=False)[1]
        elif residual is not None:
            x = x + residual
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.prenorm else self.norm(x)


class DepthwiseNorm(nn.Module):
    """Compute (y, norm(y)) with y = x + depthwise 3x3 convolution of x, all [B, H, W, C]."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm = self.norm
        return dwconv_norm(x, self.conv.weight, self.conv.bias, norm.weight, norm.bias, norm.eps, residual)


class WindowAttention(nn.Module):
    """Attend between the tokens of each window; a zero-padded border takes part. [B, H, W, C]."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(window_attention(self.qkv(x), self.qkv.bias, self.heads, self.window))


class ChannelAttention(nn.Module):
    """Attend between the channels of each group, over all tokens. [B, H, W, C]."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.groups = groups
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(channel_attention(self.qkv(x).flatten(1, 2), self.groups)).view(x.shape)


class Block(nn.Module):
    """Apply depthwise convolution and attention, then depthwise convolution and MLP. [B, H, W, C]."""

    def __init__(self, dim: int, attention: nn.Module):
        super().__init__()
        self.dw1 = DepthwiseNorm(dim)
        self.attention = attention
        self.dw2 = DepthwiseNorm(dim)
        self.fc1 = Linear(dim, 4 * dim, gelu=True)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor, residual: Tensor | None = None, defer: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the block of x, or of x + residual. With `defer` return the two terms of its last sum."""
        x, normed = self.dw1(x, residual)
        x, normed = self.dw2(x, self.attention(normed))
        residual = self.fc2(self.fc1(normed))
        return (x, residual) if defer else x + residual


class DaViT(nn.Module):
    """Map normalised pixels [B, T, T, 3] to features [B, T / stride, T / stride, dims[-1]]."""

    def __init__(self, config: DaViTConfig):
        super().__init__()
        c = config
        inputs = (3, *c.dims[:-1])
        self.embeds = nn.ModuleList(
            PatchEmbed(*sizes)
            for sizes in zip(inputs, c.dims, c.patches, c.strides, c.paddings, c.prenorm, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    nn.Sequential(
                        Block(dim, WindowAttention(dim, heads, c.window)), Block(dim, ChannelAttention(dim, groups))
                    )
                    for _ in range(depth)
                ]
            )
            for dim, heads, groups, depth in zip(c.dims, c.heads, c.groups, c.depths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for embed, stage in zip(self.embeds, self.stages, strict=True):
            x, residual = self._run(stage, embed(x, residual))
        return x if residual is None else x + residual

    def _run(self, stage: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run a stage; where one kernel adds the residual and convolves, return the two terms of its last sum."""
        if not adds_residual(x, x):
            return stage(x), None
        residual = None
        for pair in stage:
            for block in pair:
                x, residual = block(x, residual, defer=True)
        return x, residual
