"""Choose the device and the dtype that a model computes on: the one place where this is decided."""

from __future__ import annotations

import torch

from vlv.common.command import Misuse


def choose_device(word: str | torch.device | None = None) -> torch.device:
    """Return the device named by `word`; without one, the first CUDA device, or the CPU where there is none.

    Raises Misuse where `word` names no device, or a GPU that PyTorch does not find.
    """
    try:
        device = torch.device(word or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise Misuse(f"--device {word}: expected cpu, cuda, or one GPU such as cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise Misuse(f"--device {word}: PyTorch {torch.__version__} finds {count} GPUs here (nvidia-smi lists them)")
    return device


def inference_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for inference: bfloat16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
