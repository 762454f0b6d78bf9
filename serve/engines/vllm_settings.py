"""Compute vLLM's engine arguments from the card, the language model and the captions in flight; loads nothing.

The names are those of vLLM 0.23 to 0.33 (docs/compatibility.md). docs/captioning.md says why each value is what it is.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from serve.engines.base import LLMSpec
from vlv.checkpoints.folder import Checkpoint, safetensors_header

GPU_SHARE = 0.8  # of the card's memory that vLLM may use at most, as was measured; the encoder has the rest
ENCODER_MAPS = 12  # maps of the first stage's size that the encoder holds at its peak; 11.2 for the published sizes
ENCODER_OVERHEAD = 1e9  # bytes: CUDA's context and what PyTorch keeps; an estimate
SHARED_CHECK = 0.5
GPU_OVERHEAD = 3e9  # bytes: CUDA's context, graphs and the activations of a step; an estimate
IN_FLIGHT = (16, 32, 64, 128, 256, 512)  # what is chosen from: 512 is the best that was measured (h200.json)
CPU_IN_FLIGHT = 256
STEP_TOKENS = 8192  # prompt and caption tokens that one step computes at most: a hundred prompts of 77
CPU_STEP_TOKENS = 2048
CPU_BLOCK = 32  # tokens a block of vLLM's CPU cache: the fewest that its kernels take
CUDA = "/usr/local/cuda"  # where flashinfer looks for a toolkit at last
CACHE_BYTES = {"auto": None, "fp8": 1}  # bytes of a key or value; None: as many as the model's type has


@dataclass(frozen=True)
class Device:
    """What the engine runs on: its memory in bytes, which is the card's, or what the machine has free."""

    cuda: bool
    memory: int


@dataclass(frozen=True)
class VLLMSettings:
    """How vLLM is started: captions decoded together, arguments for AsyncEngineArgs, and what a user should know."""

    in_flight: int
    arguments: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settings(
    device: Device,
    spec: LLMSpec,
    max_tokens: int,
    in_flight: int | None = None,
    quantization: str | None = None,
    cache_dtype: str = "auto",
    shared: bool = False,
    devices: int = 1,
    dtype: str = "auto",
    encoder: int = 0,
) -> VLLMSettings:
    """Return how to start vLLM.

    `in_flight`: as asked for; None: as many as the card's memory takes at their longest, at most the largest of
    IN_FLIGHT. `quantization`, `cache_dtype`: of vLLM. `shared`: the encoder runs in the engine's process, where vLLM's
    own measurement of free memory would count it. `devices`: that share the language model. `dtype`: of its weights.
    `encoder`: bytes of the card that it needs.
    """
    length = spec.queries + max_tokens
    if dtype == "auto":
        dtype = "bfloat16" if device.cuda else "float32"
    number = 4 if dtype == "float32" else 2  # bytes
    value = CACHE_BYTES[cache_dtype] or number
    caption = length * spec.kv_values * value  # bytes of its keys and values
    if device.cuda:
        weights = weight_bytes(spec.folder) * number // 2 // (2 if quantization == "fp8" else 1)
        share = max(0.0, min(GPU_SHARE, 1 - encoder / device.memory))
        fit = int(max(0, devices * (share * device.memory - GPU_OVERHEAD) - weights) // caption)
        chosen = in_flight or max((n for n in IN_FLIGHT if n <= fit), default=IN_FLIGHT[0])
        arguments = {
            "gpu_memory_utilization": round(share, 3),
            "max_num_batched_tokens": max(STEP_TOKENS, chosen),
            # beyond the largest size a step runs without a graph: 54.9 captions/s instead of 79.7 on an H200
            "compilation_config": {"cudagraph_capture_sizes": graph_sizes(chosen)},
        }
        if shared:  # the share is only compared with what is free at the start, when the encoder may be there
            arguments["gpu_memory_utilization"] = SHARED_CHECK
            arguments["kv_cache_memory_bytes"] = max(1, min(fit, chosen)) * caption // devices
    else:
        chosen = in_flight or CPU_IN_FLIGHT
        # vLLM keeps one block empty; with fewer than needed it lets requests wait
        blocks = chosen * math.ceil(length / CPU_BLOCK) + 1
        needed = blocks * CPU_BLOCK * spec.kv_values * value
        fit = max(1, device.memory // 4 // caption)
        arguments = {
            "enforce_eager": True,  # without a C++ compiler at hand, and several seconds sooner than compiled
            "block_size": CPU_BLOCK,
            "kv_cache_memory_bytes": min(needed, device.memory // 4),
            "max_num_batched_tokens": max(CPU_STEP_TOKENS, chosen),
        }
    arguments |= {
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": chosen,
        "enable_prefix_caching": False,  # every prompt is another image
        "generation_config": "vllm",  # not the checkpoint's: penalties and embeddings do not go together
        "tensor_parallel_size": devices,
    }
    if quantization:
        arguments["quantization"] = quantization
    if cache_dtype != "auto":
        arguments["kv_cache_dtype"] = cache_dtype
    notes = []
    if device.cuda and fit < IN_FLIGHT[0]:
        notes.append(
            f"the GPU has {device.memory / 1e9:.1f} GB, of which the encoder needs about {encoder / 1e9:.1f} and the "
            f"language model {(weights + GPU_OVERHEAD) / 1e9:.1f}: room for {fit} captions of {length} tokens; a "
            "smaller --prompt-batch leaves more"
        )
    elif in_flight and in_flight > fit:
        notes.append(
            f"--in-flight {in_flight}: the memory takes about {fit} captions of {length} tokens at a time; the others "
            "wait"
        )
    return VLLMSettings(chosen, arguments, tuple(notes))


def encoder_bytes(checkpoint: Checkpoint, batch: int, width: int = 2) -> int:
    """Estimate the bytes of a GPU that the encoder needs for `batch` images, with numbers of `width` bytes."""
    config, file = checkpoint.config, checkpoint.encoder_file
    vision = config.vision
    side = config.image_size * config.upsample // vision.strides[0]
    activations = ENCODER_MAPS * batch * side**2 * vision.dims[0] * width
    weights = _bfloat16_bytes(file) * width // 2 if file.is_file() else 0
    return int(weights + activations + ENCODER_OVERHEAD)


def graph_sizes(in_flight: int) -> list[int]:
    """Return the batch sizes for CUDA graphs, up to `in_flight`: few, since a step is padded to the next size.

    Steps of 32 from 128 on, where a padded row costs time. Up to 512 these are 25 sizes; vLLM's own list, which ends
    there, has 51, and each costs start-up time and memory.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32, *range(48, 128, 16), *range(128, in_flight, 32)]
    return [size for size in sizes if size < in_flight] + [in_flight]


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a language model's weights on a GPU: in bfloat16, or as a quantised folder stores them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in folder.glob("*.bin"))
    return sum(map(_bfloat16_bytes, files))


def _bfloat16_bytes(file: Path) -> int:
    """Return the bytes of a safetensors file's tensors, with those of float32 counted as bfloat16."""
    total = 0
    for tensor in safetensors_header(file).values():
        start, end = tensor["data_offsets"]
        total += (end - start) // 2 if tensor["dtype"] == "F32" else end - start
    return total


def flashinfer_problem() -> str | None:
    """Return why flashinfer cannot sample here, and the remedy; None if it can.

    It compiles its kernels at their first use, with the nvcc of CUDA_HOME, CUDA_PATH, PATH or CUDA. vLLM requires it
    and pip installs it, but the nvcc that pip installs is in none of these.
    """
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed (pip install flashinfer-python)"
    if importlib.util.find_spec("flashinfer_jit_cache"):  # compiled kernels, as a package of their own
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and shutil.which("nvcc"):
        return None
    if Path(home or CUDA, "bin/nvcc").is_file():
        return None
    return "flashinfer finds no nvcc to compile its kernels (set CUDA_HOME to a CUDA toolkit)"


def free_memory() -> int:
    """Return the bytes of this machine's memory that are free."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
