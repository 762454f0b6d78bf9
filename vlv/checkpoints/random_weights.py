"""Write checkpoint folders of random weights, in any preset's size: for benchmarks, exports and tests.

The files are written tensor by tensor. The scales keep activations near one through all layers, so that timings and
relative errors are those of trained weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from vlv.checkpoints.folder import Checkpoint
from vlv.checkpoints.tensor_files import Produce, Progress, write_safetensors
from vlv.common.files import atomic_folder, write_json
from vlv.model.config import FORMAT, PRESETS, VLVConfig
from vlv.model.encoder import VLVEncoder

# Qwen2.5's configurations (huggingface.co/Qwen/Qwen2.5-0.5B and so on), and one of the tiny preset's width
_QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1_000_000.0, "max_position_embeddings": 32768}
LLMS: dict[str, dict] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "max_position_embeddings": 1024,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, **_QWEN,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, **_QWEN,
    },
    "qwen2.5-3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, **_QWEN,
    },
}  # fmt: skip


def random_tensor(name: str, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor: matrices of variance 1 / inputs; norms near one and biases near zero, neither exactly."""
    if name.endswith("temporal"):  # a constant: sin(0), cos(0), interleaved
        return torch.tensor([0.0, 1.0]).repeat(meta.numel() // 2 + 1)[: meta.numel()].to(meta.dtype)
    noise = torch.randn(meta.shape, dtype=meta.dtype, generator=generator)
    if name.endswith(("queries", "prompt", "query_embed")):
        return noise
    if meta.ndim > 1:
        return noise.mul_(meta[0].numel() ** -0.5)
    return noise.mul_(0.02).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def llm_plan(preset: str, dtype: torch.dtype) -> tuple[Qwen2Config, dict[str, Tensor]]:
    """Return a preset's language model: its transformers configuration, and its tensors as meta tensors by name."""
    config = Qwen2Config(**LLMS[preset], dtype=dtype, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.architectures = ["Qwen2ForCausalLM"]
    with torch.device("meta"):
        tensors = Qwen2ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return config, {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write(preset: str, folder: Path, dtype: str = "bfloat16", force: bool = False) -> Checkpoint:
    """Write a checkpoint folder of the preset's sizes, without t2i/. Raises OutputExists where `folder` has content."""
    config, kind = PRESETS[preset], getattr(torch, dtype)
    with torch.device("meta"):
        vision = VLVEncoder(config).to(kind).state_dict()
    llm_config, llm = llm_plan(preset, kind)
    progress = Progress("generated", sum(tensor.nbytes for part in (vision, llm) for tensor in part.values()))
    with atomic_folder(folder, progress.total, force) as made:
        write_safetensors(made / "encoder.safetensors", vision, progress.watch(maker(vision)))
        (made / "llm").mkdir()
        llm_config.save_pretrained(made / "llm")
        tokenizer(llm_config.vocab_size).save_pretrained(made / "llm")
        write_safetensors(made / "llm" / "model.safetensors", llm, progress.watch(maker(llm)))
        write_json(made / "vlv.json", {"format": FORMAT, "model": config.to_dict()})
    return Checkpoint.open(folder)


def encoder(config: VLVConfig, dtype: torch.dtype = torch.float32) -> VLVEncoder:
    """Return a random encoder in eval mode, without gradients."""
    with torch.device("meta"):
        made = VLVEncoder(config).to(dtype)
    plan = made.state_dict()
    make = maker(plan)
    made.load_state_dict({name: make(name) for name in plan}, assign=True)
    made.init_buffers()
    return made.eval().requires_grad_(False)


def maker(plan: Mapping[str, Tensor], seed: int = 0) -> Produce:
    """Return a function that generates the tensors of `plan` by name, the same for the same seed and order."""
    generator = torch.Generator().manual_seed(seed)
    return lambda name: random_tensor(name, plan[name], generator)


def tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    """Return a byte-level Qwen2Tokenizer with a placeholder word for every further id: any caption decodes to text."""
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{i}" for i in range(len(words), vocab_size)]
    return Qwen2Tokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=1024)
