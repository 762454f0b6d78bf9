"""Sample faster with a diffusers UNet whose context stays the same at every step.

    with fixed_context(unet, context):
        pipeline(...)      # or any calls of unet(latents, step, encoder_hidden_states=context)

The keys and values of all cross-attentions are computed once, on every device. On CUDA, GroupNorm with SiLU and
gated GELU are fused as well. The UNet is restored when the block ends; gradients need the plain UNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import silu

from kernels.cross_attention import cross_attention
from kernels.geglu import geglu
from kernels.groupnorm_silu import groupnorm_silu
from kernels.runtime.dispatch import fused


class FixedContext:
    """Attend to one context [B, N, C] whose keys and values [B, N, heads, d] are computed once."""

    def __init__(self, attn, context: Tensor):
        self.shape = context.shape
        self.key = attn.to_k(context).unflatten(-1, (attn.heads, -1))
        self.value = attn.to_v(context).unflatten(-1, (attn.heads, -1))

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None, **_
    ) -> Tensor:
        if encoder_hidden_states.shape != self.shape:
            raise ValueError(
                f"the UNet is fixed to a context {list(self.shape)} and got {list(encoder_hidden_states.shape)}"
            )
        if attention_mask is not None:
            raise ValueError("a UNet with a fixed context takes no attention mask")
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        out = cross_attention(query, self.key, self.value).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def is_plain_cross_attention(attn: nn.Module) -> bool:
    """Return True if `FixedContext` computes the same as this diffusers Attention."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return attn.is_cross_attention and isinstance(attn.processor, AttnProcessor2_0) and not any(extras)


class FusedNorm(nn.Module):
    """Compute a GroupNorm, followed by SiLU if `activation`."""

    def __init__(self, norm: nn.GroupNorm, activation: bool):
        super().__init__()
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return groupnorm_silu(x, n.num_groups, n.weight, n.bias, n.eps, self.activation)


class FusedGEGLU(nn.Module):
    """Compute diffusers' GEGLU: projection, then the gated activation."""

    def __init__(self, projection: nn.Linear):
        super().__init__()
        self.proj = projection

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class ActivatedProjection(nn.Module):
    """Project the time embedding after the SiLU that its block would apply before the projection."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.proj = projection

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(silu(x))


def fused_parts(unet: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (parent, attribute, fused module) for what has a fused kernel, in a UNet or half an autoencoder."""
    found = []
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, nn.SiLU):
            if module.time_embedding_norm == "scale_shift" or module.skip_time_act:  # something between norm and SiLU
                continue
            found += [(module, name, FusedNorm(getattr(module, name), True)) for name in ("norm1", "norm2")]
            found.append((module, "nonlinearity", nn.Identity()))
            if module.time_emb_proj is not None:
                found.append((module, "time_emb_proj", ActivatedProjection(module.time_emb_proj)))
        elif isinstance(module, Transformer2DModel) and isinstance(module.norm, nn.GroupNorm):
            found.append((module, "norm", FusedNorm(module.norm, False)))
        elif isinstance(module, nn.ModuleList):  # of a feed-forward block
            found += [(module, str(i), FusedGEGLU(m.proj)) for i, m in enumerate(module) if isinstance(m, GEGLU)]
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and isinstance(unet.conv_act, nn.SiLU):
        found += [(unet, "conv_norm_out", FusedNorm(unet.conv_norm_out, True)), (unet, "conv_act", nn.Identity())]
    return found


@contextmanager
def fixed_context(unet: nn.Module, context: Tensor) -> Iterator[None]:
    """Fix `unet` to one context [B, N, C] within the block; its keys and values are computed once."""
    processors = dict(unet.attn_processors)
    attentions = {f"{name}.processor": m for name, m in unet.named_modules() if hasattr(m, "is_cross_attention")}
    fixed = {n: FixedContext(m, context) for n, m in attentions.items() if is_plain_cross_attention(m)}
    parts = fused_parts(unet) if fused("unet", context, next(unet.parameters())) else []
    originals = [(parent, name, getattr(parent, name)) for parent, name, _ in parts]
    try:
        unet.set_attn_processor({**processors, **fixed})
        for parent, name, part in parts:
            setattr(parent, name, part)
        yield
    finally:
        for parent, name, part in originals:
            setattr(parent, name, part)
        unet.set_attn_processor(processors)
