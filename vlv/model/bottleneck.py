"""Define the information bottleneck: image features -> BART -> a few learned queries -> CLIP's text layers.

BART (Lewis et al. 2019, arXiv 1910.13461) is post-norm: residual, then LayerNorm. CLIP's text model
is pre-norm. Both are causal over the queries, as published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.add_norm import add_norm, fuses
from kernels.attention import attention
from kernels.linear import Linear
from vlv.model.config import VLVConfig


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split [B, N, parts * C] into `parts` tensors [B, heads, N, C / heads]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class SelfAttention(nn.Module):
    """Attend within a sequence [B, N, C]."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out = attention(*_heads(self.qkv(x), 3, self.heads), self.causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attend from queries [B, N, C] to a memory [B, M, C]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Attend from x [B, N, C], or [1, N, C] for the same queries everywhere, to memory [B, M, C]: [B, N, C]."""
        (q,) = _heads(self.q(x), 1, self.heads)
        q = q.expand(memory.shape[0], -1, -1, -1)
        out = attention(q, *_heads(self.kv(memory), 2, self.heads))
        return self.proj(out.transpose(1, 2).flatten(2))


class BartLayer(nn.Module):
    """Compute a layer of BART's encoder, or of its decoder (`decoder`: causal, with attention to a memory)."""

    def __init__(self, width: int, heads: int, ffn: int, decoder: bool):
        super().__init__()
        self.attention = SelfAttention(width, heads, causal=decoder)
        self.attention_norm = nn.LayerNorm(width)
        if decoder:
            self.cross = CrossAttention(width, heads)
            self.cross_norm = nn.LayerNorm(width)
        self.fc1 = Linear(width, ffn, gelu=True)
        self.fc2 = Linear(ffn, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        _, x = add_norm(x, self.attention(x), self.attention_norm, keep_sum=False)
        if memory is not None:
            _, x = add_norm(x, self.cross(x, memory), self.cross_norm, keep_sum=False)
        return add_norm(x, self.fc2(self.fc1(x)), self.norm, keep_sum=False)[1]


class Bart(nn.Module):
    """Run BART's encoder or decoder over embeddings [B, N, width], with learned positions."""

    def __init__(self, config: VLVConfig, layers: int, decoder: bool):
        super().__init__()
        c = config
        self.positions = nn.Parameter(torch.randn(c.text_positions, c.width) * 0.02)
        self.norm = nn.LayerNorm(c.width)
        self.layers = nn.ModuleList(BartLayer(c.width, c.heads, c.ffn, decoder) for _ in range(layers))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        _, x = add_norm(x, self.positions[: x.shape[1]], self.norm, keep_sum=False)
        for layer in self.layers:
            x = layer(x, memory)
        return x


def quick_gelu(x: Tensor) -> Tensor:
    """Compute the sigmoid approximation of GELU in OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


class ClipLayer(nn.Module):
    """Compute a causal pre-norm layer of CLIP's text model, [B, N, C]."""

    def __init__(self, width: int, heads: int, ffn: int, activation: str):
        super().__init__()
        # GELU is part of the fused linear layer
        self.activation = {"gelu": nn.Identity(), "quick_gelu": quick_gelu}[activation]
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = Linear(width, ffn, gelu=activation == "gelu")
        self.fc2 = Linear(ffn, width)

    def forward(self, x: Tensor, residual: Tensor | None = None, defer: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the layer of x, or of x + residual. With `defer` return the two terms of its last sum."""
        x, normed = (x, self.norm1(x)) if residual is None else add_norm(x, residual, self.norm1)
        x, normed = add_norm(x, self.attention(normed), self.norm2)
        residual = self.fc2(self.activation(self.fc1(normed)))
        return (x, residual) if defer else x + residual


class ClipText(nn.Module):
    """Run CLIP's text model after its token embedding: [B, N, C] -> context [B, N, C]."""

    def __init__(self, config: VLVConfig):
        super().__init__()
        c = config
        self.positions = nn.Parameter(torch.randn(c.queries, c.context_width) * 0.01)
        self.layers = nn.ModuleList(
            ClipLayer(c.context_width, c.context_heads, c.context_ffn, c.context_activation)
            for _ in range(c.context_layers)
        )
        self.norm = nn.LayerNorm(c.context_width)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.positions[: x.shape[1]]
        if fuses(x, residual, self.norm):  # every sum is left to the kernel of the norm that follows it
            for layer in self.layers:
                x, residual = layer(x, residual, defer=True)
            return add_norm(x, residual, self.norm, keep_sum=False)[1]
        x = x + residual
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def copy_from(self, clip) -> None:
        """Copy the weights of a transformers CLIPTextModel, except its token embedding."""
        source = clip.state_dict()
        self.positions.data.copy_(source["embeddings.position_embedding.weight"][: len(self.positions)])
        self.norm.load_state_dict({k: source[f"final_layer_norm.{k}"] for k in ("weight", "bias")})
        names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        names["attention.proj"] = "self_attn.out_proj"
        for i, layer in enumerate(self.layers):
            for kind in ("weight", "bias"):
                qkv = [source[f"encoder.layers.{i}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                layer.get_parameter(f"attention.qkv.{kind}").data.copy_(torch.cat(qkv))
                for ours, theirs in names.items():
                    layer.get_parameter(f"{ours}.{kind}").data.copy_(source[f"encoder.layers.{i}.{theirs}.{kind}"])


class Bottleneck(nn.Module):
    """Map image features [B, M, width] to a context [B, queries, context_width]."""

    def __init__(self, config: VLVConfig):
        super().__init__()
        c = config
        self.prompt = nn.Parameter(torch.randn(c.prompt_tokens, c.width) * 0.02)  # embeddings of the task prompt
        self.queries = nn.Parameter(torch.randn(c.queries, c.width))
        self.encoder = Bart(c, c.encoder_layers, decoder=False)
        self.decoder = Bart(c, c.decoder_layers, decoder=True)
        self.projection = nn.Sequential(
            Linear(c.width, c.context_width), nn.GELU(), Linear(c.context_width, c.context_width)
        )
        self.text = ClipText(c)

    def forward(self, features: Tensor) -> Tensor:
        return self.text(self.projection(self.decode(features)))

    def decode(self, features: Tensor) -> Tensor:
        """Return the decoder's output at the queries: [B, queries, width]."""
        memory = self.encoder(torch.cat([features, self.prompt.expand(features.shape[0], -1, -1)], dim=1))
        # one row: up to the first cross-attention nothing depends on the image, so an export folds it to a constant
        return self.decoder(self.queries[None], memory)
