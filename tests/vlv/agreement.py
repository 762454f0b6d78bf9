"""What the tests of agreement share: random weights and a distance."""

from __future__ import annotations

import torch


def random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, norms and biases too: a swapped or ignored one would show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    return module.eval().requires_grad_(False)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
