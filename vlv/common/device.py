"""Choose the device and the dtype that a model computes on: the one place where this is decided."""

from __future__ import annotations

import torch


def choose_device(word: str | torch.device | None = None) -> torch.device:
    """Return the device named by `word`; without one, the first CUDA device, or the CPU where there is none."""
    return torch.device(word or ("cuda" if torch.cuda.is_available() else "cpu"))


def inference_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for inference: bfloat16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
