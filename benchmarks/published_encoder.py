"""The published encoder assembled from transformers' parts: what our own is compared with.

Florence-2's vision tower and projector, BART's encoder and decoder and CLIP's text model, holding the
very weights of a given `VLVEncoder` (views of them, so both fit in memory at full size).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BartConfig, CLIPTextConfig, CLIPTextModel, Florence2Config, Florence2VisionConfig
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder
from transformers.models.florence2.modeling_florence2 import Florence2MultiModalProjector, Florence2VisionBackbone

from vlv.model.config import DaViTConfig, VLVConfig
from vlv.model.encoder import VLVEncoder


def vision_config(c: DaViTConfig, width: int = 1024, positions: int = 50) -> Florence2VisionConfig:
    return Florence2VisionConfig(
        embed_dim=c.dims, num_heads=c.heads, num_groups=c.groups, depths=c.depths, patch_size=c.patches,
        patch_stride=c.strides, patch_padding=c.paddings, patch_prenorm=c.prenorm, window_size=c.window,
        projection_dim=width, max_position_embeddings=positions,
    )  # fmt: skip


def bart_config(c: VLVConfig) -> BartConfig:
    return BartConfig(
        vocab_size=4, d_model=c.width, max_position_embeddings=c.text_positions,
        encoder_layers=c.encoder_layers, encoder_attention_heads=c.heads, encoder_ffn_dim=c.ffn,
        decoder_layers=c.decoder_layers, decoder_attention_heads=c.heads, decoder_ffn_dim=c.ffn,
    )  # fmt: skip


def clip_config(c: VLVConfig) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=4, hidden_size=c.context_width, intermediate_size=c.context_ffn, hidden_act=c.context_activation,
        num_hidden_layers=c.context_layers, num_attention_heads=c.context_heads, max_position_embeddings=c.queries,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def _fill(module: nn.Module, weights: dict[str, Tensor], ours_to_theirs) -> nn.Module:
    """Give `module` the weights under its own names; everything it keeps besides is a token table or constant."""
    named = dict(pair for name, tensor in weights.items() for pair in ours_to_theirs(name, tensor))
    absent, unexpected = module.load_state_dict(named, strict=False, assign=True)
    assert not unexpected, unexpected
    assert all("embed_tokens" in k or "token_embedding" in k or "pos_idx_to_embed" in k for k in absent), absent
    return module.eval().requires_grad_(False)


def _tower_names(name: str, tensor: Tensor):
    part, *rest = name.split(".")
    if part == "embeds":
        return [(".".join(["convs", *rest]), tensor)]
    stage, depth, kind, *rest = rest
    block = ("spatial_block", "channel_block")[int(kind)]
    inner = ".".join(rest).replace("attention.", "window_attn." if kind == "0" else "channel_attn.")
    for ours, theirs in [("dw1.conv", "conv1"), ("dw1.norm", "norm1"), ("dw2.conv", "conv2"), ("dw2.norm", "norm2")]:
        inner = inner.replace(ours, theirs)
    inner = inner.replace("fc", "ffn.fc")
    return [(f"blocks.{stage}.{depth}.{block}.{inner}", tensor)]


def _projector_names(name: str, tensor: Tensor):
    names = {
        "columns": "image_position_embed.column_embeddings.weight",
        "rows": "image_position_embed.row_embeddings.weight",
        "projection.weight": "image_projection.weight",
        "norm.weight": "image_proj_norm.weight",
        "norm.bias": "image_proj_norm.bias",
    }
    return [(names[name], tensor)] if name in names else []


def _layer_names(inner: str, tensor: Tensor, renamed: dict[str, str]):
    for prefix, theirs in {"attention.": "self_attn.", "cross.": "encoder_attn."}.items():
        if inner.startswith(prefix):
            which, kind = inner.removeprefix(prefix).rsplit(".", 1)
            parts = {"qkv": "qkv", "q": "q", "kv": "kv"}.get(which)
            if parts is None:
                return [(f"{theirs}out_proj.{kind}", tensor)]
            return [(f"{theirs}{p}_proj.{kind}", t) for p, t in zip(parts, tensor.chunk(len(parts)), strict=True)]
    head, kind = inner.rsplit(".", 1)
    return [(f"{renamed.get(head, head)}.{kind}", tensor)]


def _bart_names(name: str, tensor: Tensor):
    if name == "positions":  # BART's table starts with two rows that it never uses
        return [("embed_positions.weight", torch.cat([tensor[:2], tensor]))]
    if name.startswith("norm"):
        return [(name.replace("norm", "layernorm_embedding"), tensor)]
    _, layer, inner = name.split(".", 2)
    renamed = {"attention_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm"}
    pairs = _layer_names(inner, tensor, {**renamed, "norm": "final_layer_norm"})
    return [(f"layers.{layer}.{k}", v) for k, v in pairs]


def _clip_names(name: str, tensor: Tensor):
    if name == "positions":
        return [("embeddings.position_embedding.weight", tensor)]
    if name.startswith("norm"):
        return [(f"final_layer_{name}", tensor)]
    _, layer, inner = name.split(".", 2)
    renamed = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    return [(f"encoder.layers.{layer}.{k}", v) for k, v in _layer_names(inner, tensor, renamed)]


def tower(ours: nn.Module, config: DaViTConfig, attention: str = "eager") -> Florence2VisionBackbone:
    theirs = vision_config(config)
    theirs._attn_implementation = attention
    return _fill(Florence2VisionBackbone(theirs), ours.state_dict(), _tower_names)


def bart(ours: nn.Module, config: VLVConfig, decoder: bool, attention: str = "eager") -> nn.Module:
    theirs = bart_config(config)
    theirs._attn_implementation = attention
    return _fill((BartDecoder if decoder else BartEncoder)(theirs), ours.state_dict(), _bart_names)


def clip_text(ours: nn.Module, config: VLVConfig, attention: str = "eager") -> CLIPTextModel:
    theirs = clip_config(config)
    theirs._attn_implementation = attention
    return _fill(CLIPTextModel(theirs), ours.state_dict(), _clip_names)


def run_clip_text(model: CLIPTextModel, embeds: Tensor) -> Tensor:
    """CLIPTextModel on embeddings [B, N, C]; its own forward takes only token ids."""
    n = embeds.shape[1]
    mask = torch.full((n, n), float("-inf"), dtype=embeds.dtype, device=embeds.device).triu(1)[None, None]
    hidden = model.embeddings(inputs_embeds=embeds)
    return model.final_layer_norm(model.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state)


class PublishedEncoder(nn.Module):
    """Normalised pixels [B, 3, T, T] -> prompt embeddings [B, queries, llm_width], as the published code runs it."""

    def __init__(self, ours: VLVEncoder, attention: str = "eager"):
        super().__init__()
        c, b = ours.config, ours.bottleneck
        florence = Florence2Config(
            vision_config=vision_config(c.vision, c.width, c.image_positions), text_config=bart_config(c)
        )
        self.tower = tower(ours.vision, c.vision, attention)
        self.projector = _fill(Florence2MultiModalProjector(florence), ours.image.state_dict(), _projector_names)
        self.projector.visual_temporal_embed.to(ours.dtype)
        self.encoder = bart(b.encoder, c, decoder=False, attention=attention)
        self.decoder = bart(b.decoder, c, decoder=True, attention=attention)
        self.text = clip_text(b.text, c, attention)
        self.prompt, self.queries = b.prompt, b.queries
        self.projection, self.to_llm = b.projection, ours.to_llm

    def forward(self, pixels: Tensor) -> Tensor:
        batch = len(pixels)
        features = self.projector(self.tower(pixels).last_hidden_state)
        memory = self.encoder(inputs_embeds=torch.cat([features, self.prompt.expand(batch, -1, -1)], dim=1))
        hidden = self.decoder(
            inputs_embeds=self.queries.expand(batch, -1, -1),
            encoder_hidden_states=memory.last_hidden_state,
            use_cache=False,
        )
        return self.to_llm(run_clip_text(self.text, self.projection(hidden.last_hidden_state)))
