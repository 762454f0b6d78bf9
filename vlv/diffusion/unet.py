"""Sample faster with a diffusers UNet whose context stays the same at every step.

    with fixed_context(unet, context):
        pipeline(...)      # or any calls of unet(latents, step, encoder_hidden_states=context)

The keys and values of all cross-attentions are computed once, on every device. The UNet is restored when the block
ends; gradients need the plain UNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from kernels.cross_attention import cross_attention


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


@contextmanager
def fixed_context(unet: nn.Module, context: Tensor) -> Iterator[None]:
    """Fix `unet` to one context [B, N, C] within the block; its keys and values are computed once."""
    processors = dict(unet.attn_processors)
    attentions = {f"{name}.processor": m for name, m in unet.named_modules() if hasattr(m, "is_cross_attention")}
    fixed = {n: FixedContext(m, context) for n, m in attentions.items() if is_plain_cross_attention(m)}
    try:
        unet.set_attn_processor({**processors, **fixed})
        yield
    finally:
        unet.set_attn_processor(processors)
