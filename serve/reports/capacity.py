"""Compute what captioning on a GPU needs: memory by requests in flight, and the cost of a million captions.

Everything is computed from the checkpoint's sizes without a GPU and without its weights; nothing is measured here but
`MEASURED`, which names where its figure comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from vlv.checkpoints.published import resolve
from vlv.checkpoints.random_weights import llm_plan
from vlv.common.table import table
from vlv.model.config import PRESETS, VLVConfig
from vlv.model.encoder import VLVEncoder
from vlv.train.memory_plan import Peak

IN_FLIGHT = (64, 128, 256, 512)
OVERHEAD = 2.5e9  # bytes: two CUDA contexts, vLLM's graphs and its activations; an estimate
MEASURED = {"qwen2.5-3b": (79.7, "one H200, 512 in flight, 220 tokens: benchmarks/gpu/h200.json")}


@dataclass(frozen=True)
class Capacity:
    """The memory that captioning needs, in bytes."""

    encoder: int  # weights in bfloat16
    language_model: int  # weights in bfloat16
    activations: int  # the encoder's at their peak
    cache_per_request: int  # keys and values of the longest caption with its prompt, in bfloat16
    prompt_tokens: int
    max_tokens: int

    def total(self, in_flight: int) -> float:
        """Return the bytes that `in_flight` captions of full length at a time need."""
        fixed = self.encoder + self.language_model + self.activations + OVERHEAD
        return fixed + in_flight * self.cache_per_request


def sizes_of(name: str) -> tuple[VLVConfig, object]:
    """Return the configurations of encoder and language model, of a preset or a checkpoint. Raises CheckpointError."""
    if name in PRESETS and not Path(name).exists():
        return PRESETS[name], llm_plan(name, torch.bfloat16)[0]
    checkpoint = resolve(name)
    return checkpoint.config, AutoConfig.from_pretrained(checkpoint.llm)


def capacity(config: VLVConfig, llm_config, max_tokens: int = 300, batch: int = 32) -> Capacity:
    """Compute the memory of an encoder batch of `batch` images and of captions of up to `max_tokens` tokens."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config)
    parameters = {p.data_ptr() or id(p): p.numel() for p in llm.parameters()}  # tied embeddings count once
    with FakeTensorMode():
        encoder = VLVEncoder(config).eval()
        for tensor in (*encoder.parameters(), *encoder.buffers()):  # tensors without data cannot be cast in place
            if tensor.is_floating_point():
                tensor.data = tensor.data.bfloat16()
        pixels = torch.zeros(batch, 3, config.image_size, config.image_size, dtype=torch.uint8)
        with torch.no_grad(), Peak() as peak:
            encoder(pixels)
    heads = getattr(llm_config, "num_key_value_heads", None) or llm_config.num_attention_heads
    head_dim = getattr(llm_config, "head_dim", None) or llm_config.hidden_size // llm_config.num_attention_heads
    per_token = 2 * llm_config.num_hidden_layers * heads * head_dim * 2  # keys and values, two bytes each
    return Capacity(
        encoder=2 * sum(p.numel() for p in encoder.parameters()),
        language_model=2 * sum(parameters.values()),
        activations=peak.bytes,
        cache_per_request=per_token * (config.queries + max_tokens),
        prompt_tokens=config.queries,
        max_tokens=max_tokens,
    )


def report(name: str, gpu_memory: float | None, price: float | None, max_tokens: int = 300, batch: int = 32) -> str:
    """Return the text of `--plan`: memory by requests in flight; with a price per GPU hour, dollars per million."""
    found = capacity(*sizes_of(name), max_tokens, batch)
    head = ["in flight", "GPU memory", *(["fits"] if gpu_memory else [])]
    rows = []
    for count in IN_FLIGHT:
        gigabytes = found.total(count) / 1e9
        fits = ["yes" if gigabytes <= gpu_memory else "no"] if gpu_memory else []
        rows.append([count, f"{gigabytes:.1f} GB", *fits])
    weights = f"encoder {found.encoder / 1e9:.1f} GB, language model {found.language_model / 1e9:.1f} GB"
    lines = [
        f"{name}, bfloat16: {weights}; {batch} images in the encoder {found.activations / 1e9:.1f} GB;",
        f"a caption of {found.prompt_tokens} + {max_tokens} tokens {found.cache_per_request / 1e6:.1f} MB;",
        f"CUDA and vLLM about {OVERHEAD / 1e9:.1f} GB",
        "",
        table(head, rows),
        "",
    ]
    if name in MEASURED:
        rate, where = MEASURED[name]
        lines.append(f"measured: {rate} captions/s ({where})")
        if price:
            lines.append(f"at ${price:g} an hour: ${1e6 / rate / 3600 * price:.2f} for a million captions")
    else:
        lines.append("captions/s: not measured for these sizes; --limit 2000 on your GPU shows the rate")
    return "\n".join(lines)
