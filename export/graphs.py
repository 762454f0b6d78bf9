"""Define the module of each component: torch.onnx.export traces it, and in float32 it is the reference of every check.

`load(checkpoint, name)` makes one. Inputs and outputs are uint8, int32 or float32; `cast` changes the inside.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from export.components import COMPONENTS, Port
from kernels.attention import attention
from kernels.cross_attention import cross_attention
from vlv.checkpoints.folder import Checkpoint
from vlv.model.encoder import VLVEncoder


class Graph(nn.Module):
    """One component. `blocks` are the paths of the modules that are cast, reported and kept in float32 as units."""

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    blocks: tuple[str, ...]
    constants: tuple[str, ...] = ()  # buffers that stay float32 in every precision
    dtype = torch.float32

    def cast(self, dtype: torch.dtype, fp32_blocks: Collection[str] = ()) -> Graph:
        """Compute in `dtype`, except for `fp32_blocks`, which keep their weights and compute between casts."""
        blocks = tuple(f"{path}." for path in fp32_blocks)
        weights = (*self.named_parameters(), *self.named_buffers())
        kept = {name: value.data for name, value in weights if name in self.constants or name.startswith(blocks)}
        self.dtype = dtype
        self.to(dtype)
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            value.data = kept.get(name, value.data)
        for path in fp32_blocks:
            block = self.get_submodule(path)
            block.register_forward_pre_hook(_caster(torch.float32), with_kwargs=True)
            block.register_forward_hook(lambda _, __, output: _cast(output, dtype))
        return self

    def fuse(self) -> Graph:
        """Replace plain modules by operations of kernels/, for an export that keeps them as nodes."""
        return self

    def example(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return random inputs of the right dtypes and shapes, for tracing."""
        inputs = []
        for port in self.inputs:
            if port.dtype == "uint8":
                inputs.append(torch.randint(0, 256, port.at(batch), dtype=torch.uint8, generator=generator))
            elif port.dtype == "int32":
                inputs.append(torch.zeros(port.at(batch), dtype=torch.int32))
            else:
                inputs.append(torch.randn(port.at(batch), generator=generator))
        return tuple(inputs)

    @property
    def longest_sum(self) -> int:
        """Return the length of the longest sum: the inputs of the widest linear layer or convolution."""
        return max(p[0].numel() for p in self.parameters() if p.ndim > 1)


def _cast(value, dtype: torch.dtype):
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _caster(dtype: torch.dtype):
    return lambda _, args, kwargs: (_cast(args, dtype), {k: _cast(v, dtype) for k, v in kwargs.items()})


class EncoderGraph(Graph):
    """Encode crops to the context of the text-to-image model and, in a captioning checkpoint, to prompt embeddings."""

    constants = ("encoder.mean", "encoder.std", "encoder.resize")

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        size, stages = encoder.config.image_size, encoder.vision.stages
        self.inputs = (Port("pixels", "uint8", (3, size, size)),)
        self.outputs = ("context",) if encoder.to_llm is None else ("context", "prompts")
        paths = [
            p for i in range(len(stages)) for p in (f"vision.embeds.{i}", *_children(encoder, f"vision.stages.{i}"))
        ]
        paths += ["image", *_children(encoder, "bottleneck.encoder.layers")]
        paths += [*_children(encoder, "bottleneck.decoder.layers"), "bottleneck.projection"]
        paths += _children(encoder, "bottleneck.text.layers")
        paths += [] if encoder.to_llm is None else ["to_llm"]
        self.blocks = tuple(f"encoder.{p}" for p in paths)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        context = self.encoder.context(pixels)
        prompts = () if self.encoder.to_llm is None else (self.encoder.to_llm(context).float(),)
        return context.float(), *prompts


def _children(module: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in module.get_submodule(path).named_children()]


def _cross_attentions(unet) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in unet.named_modules() if path.endswith("attn2")]


class ContextKV(Graph):
    """Compute the keys and values of all cross-attentions, which are the same in every step of the sampling."""

    def __init__(self, unet, tokens: int):
        super().__init__()
        self.layers = nn.ModuleList()
        for _, attn in _cross_attentions(unet):
            _require_plain(attn)
            kv = nn.Linear(attn.to_k.in_features, 2 * attn.to_k.out_features, attn.to_k.bias is not None)
            kv.weight = nn.Parameter(torch.cat([attn.to_k.weight, attn.to_v.weight]))
            if kv.bias is not None:
                kv.bias = nn.Parameter(torch.cat([attn.to_k.bias, attn.to_v.bias]))
            self.layers.append(kv)
        self.heads = [attn.heads for _, attn in _cross_attentions(unet)]
        self.inputs = (Port("context", "float32", (tokens, unet.config.cross_attention_dim)),)
        self.outputs = tuple(f"kv_{i}" for i in range(len(self.layers)))
        self.blocks = tuple(f"layers.{i}" for i in range(len(self.layers)))
        self.requires_grad_(False)

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        context = context.to(self.dtype)
        return tuple(
            # [B, N, 2C] -> [B, 2, heads, N, d]
            layer(context).unflatten(-1, (2, heads, -1)).permute(0, 2, 3, 1, 4).float()
            for layer, heads in zip(self.layers, self.heads, strict=True)
        )


def _is_plain(attn: nn.Module) -> bool:
    """Return True if the attention has no norm that ContextKV and our processors would leave out."""
    return not (attn.norm_cross or attn.norm_q is not None or attn.norm_k is not None)


def _require_plain(attn: nn.Module) -> None:
    if not _is_plain(attn):
        raise ValueError(
            "this UNet normalises inside its cross-attention: only plain ones, as SD 1 and 2, are exported"
        )


class CachedContext:
    """An attention processor that takes its keys and values from entry `index` of encoder_hidden_states."""

    def __init__(self, index: int):
        self.index = index

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, temb=None) -> Tensor:
        """hidden_states: [B, M, C]; encoder_hidden_states: all layers' kv_i [B, 2, heads, N, d]. Returns [B, M, C]."""
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key, value = encoder_hidden_states[self.index].to(query.dtype).transpose(2, 3).unbind(1)
        out = attn.to_out[0](cross_attention(query, key, value).flatten(2))
        return out / attn.rescale_output_factor


class SelfAttention:
    """An attention processor that computes with kernels.attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        """hidden_states: [B, M, C], an image's tokens. Returns [B, M, C]."""
        projected = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        heads = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        return attn.to_out[0](attention(*heads).transpose(1, 2).flatten(2)) / attn.rescale_output_factor


class UNetStep(Graph):
    """Predict once with the UNet, its cross-attentions' keys and values taken from ContextKV."""

    def __init__(self, unet, tokens: int):
        super().__init__()
        self.unet = unet
        size, layers = unet.config.sample_size, _cross_attentions(unet)
        processors = dict(unet.attn_processors)
        kv = []
        for i, (path, attn) in enumerate(layers):
            processors[f"{path}.processor"] = CachedContext(i)
            kv.append(Port(f"kv_{i}", "float32", (2, attn.heads, tokens, attn.inner_dim // attn.heads)))
        unet.set_attn_processor(processors)
        self.inputs = (
            Port("latents", "float32", (unet.config.in_channels, size, size)),
            Port("timestep", "float32", (1,), batched=False),
            *kv,
        )
        self.outputs = ("prediction",)
        parts = ["time_embedding", "conv_in", *_children(unet, "down_blocks"), "mid_block"]
        parts += [*_children(unet, "up_blocks"), "conv_norm_out", "conv_out"]
        self.blocks = tuple(f"unet.{p}" for p in parts)

    def fuse(self) -> Graph:
        processors = dict(self.unet.attn_processors)
        for path, attn in self.unet.named_modules():
            if path.endswith("attn1") and _is_plain(attn) and not attn.is_cross_attention:
                processors[f"{path}.processor"] = SelfAttention()
        self.unet.set_attn_processor(processors)
        return self

    def forward(self, latents: Tensor, timestep: Tensor, *kv: Tensor) -> Tensor:
        latents = latents.to(self.dtype)
        return self.unet(latents, timestep, encoder_hidden_states=kv, return_dict=False)[0].float()


class VaeDecoder(Graph):
    """Decode scaled latents to an image with values from 0 to 1."""

    def __init__(self, vae, sample_size: int):
        super().__init__()
        self.vae = vae
        self.inputs = (Port("latents", "float32", (vae.config.latent_channels, sample_size, sample_size)),)
        self.outputs = ("image",)
        parts = ["conv_in", "mid_block", *_children(vae.decoder, "up_blocks"), "conv_norm_out", "conv_out"]
        self.blocks = tuple(f"vae.decoder.{p}" for p in parts)

    def forward(self, latents: Tensor) -> Tensor:
        latents = (latents / self.vae.config.scaling_factor).to(self.dtype)
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


class VaeEncoder(Graph):
    """Encode an image to scaled latents, the posterior's mode."""

    def __init__(self, vae, image_size: int):
        super().__init__()
        self.vae = vae
        self.inputs = (Port("pixels", "uint8", (3, image_size, image_size)),)
        self.outputs = ("latents",)
        parts = ["conv_in", *_children(vae.encoder, "down_blocks"), "mid_block", "conv_norm_out", "conv_out"]
        self.blocks = tuple(f"vae.encoder.{p}" for p in parts)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = (pixels.float() / 127.5 - 1).to(self.dtype)
        return self.vae.encode(pixels, return_dict=False)[0].mode().float() * self.vae.config.scaling_factor


class TextEncoder(Graph):
    """Encode the token ids of prompts to the context; guidance needs that of the empty prompt."""

    def __init__(self, text, tokens: int):
        super().__init__()
        self.text = text
        self.inputs = (Port("ids", "int32", (tokens,)),)
        self.outputs = ("context",)
        self.blocks = tuple(f"text.{p}" for p in _children(text, "encoder.layers"))

    def forward(self, ids: Tensor) -> Tensor:
        return self.text(ids).last_hidden_state.float()


def load(checkpoint: Checkpoint, name: str) -> Graph:
    """Load a component of a checkpoint in float32 and eval mode. Raises CheckpointError if weights are missing."""
    if COMPONENTS[name].needs == "encoder":
        return EncoderGraph(checkpoint.load_encoder()).eval()
    from vlv.diffusion.t2i import T2I  # diffusers: seconds of imports that captioning does not need

    t2i = T2I.load(checkpoint.t2i)
    tokens = t2i.tokenizer.model_max_length
    return _t2i_component(name, t2i.unet, t2i.vae, t2i.text_encoder, tokens).eval().requires_grad_(False)


def skeleton(checkpoint: Checkpoint, name: str) -> Graph:
    """Build a component on the meta device: its inputs, outputs and blocks, without its weights."""
    if COMPONENTS[name].needs == "encoder":
        with torch.device("meta"):
            return EncoderGraph(VLVEncoder(checkpoint.config))
    from diffusers import AutoencoderKL, UNet2DConditionModel  # see above
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = checkpoint.t2i
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer").model_max_length
        return _t2i_component(name, unet, vae, text, tokens)


def _t2i_component(name: str, unet: nn.Module, vae: nn.Module, text: nn.Module, tokens: int) -> Graph:
    size = unet.config.sample_size
    if name == "context_kv":
        return ContextKV(unet, tokens)
    if name == "unet":
        return UNetStep(unet, tokens)
    if name == "vae_decoder":
        return VaeDecoder(vae, size)
    if name == "vae_encoder":
        return VaeEncoder(vae, size * 2 ** (len(vae.config.block_out_channels) - 1))
    return TextEncoder(text, tokens)
