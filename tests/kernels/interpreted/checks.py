"""How a kernel is compared with its reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The largest relative error of one rounding; the interpreter cuts bfloat16 off in place of rounding it.
UNIT = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def surrounded(x: Tensor) -> Tensor:
    """x as the middle of a larger tensor full of NaN: other strides, and poison for a read beyond the edge."""
    frame = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype)
    middle = frame[tuple(slice(1, n + 1) for n in x.shape)]
    middle.copy_(x)
    return middle


def far_apart(x: Tensor, dim: int) -> Tensor:
    """x with its slices along `dim` so far apart that the last one's offset exceeds 32 bits.

    The memory between them is reserved and never touched.
    """
    others = [n for i, n in enumerate(x.shape) if i != dim]
    step = 2**31 // (x.shape[dim] - 1) + 64
    strides, run = [0] * x.ndim, 1
    for i in reversed(range(x.ndim)):
        if i != dim:
            strides[i], run = run, run * x.shape[i]
    strides[dim] = step
    assert run == torch.Size(others).numel() <= step
    memory = torch.empty(step * (x.shape[dim] - 1) + run, dtype=x.dtype)
    result = memory.as_strided(x.shape, strides)
    result.copy_(x)
    return result


def compare(
    operation: Callable, reference: Callable, inputs: list[Tensor], *args, depth: int, gradients: bool = False
) -> None:
    """Results, and gradients for a random gradient of the results, against float64.

    Every value passes at most four roundings to its dtype (an operand, a probability, its gradient, the result),
    each relative to the largest value there; sums of `depth` float32 terms err by at most that many units.
    """
    dtype = inputs[0].dtype
    relative = 4 * UNIT[dtype] + 2 * depth * (UNIT[torch.float64] if dtype == torch.float64 else UNIT[torch.float32])
    inputs = [x.detach().requires_grad_(gradients) for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_(gradients) for x in inputs]
    found, exact = operation(*inputs, *args), reference(*exact_inputs, *args)
    found, exact = ((r if isinstance(r, tuple) else (r,)) for r in (found, exact))
    largest = max([x.detach().abs().max().item() for x in (*exact, *exact_inputs) if x.numel()], default=0)
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert_close(a, b, relative * largest)
    if gradients:
        grads = [surrounded(torch.randn(r.shape).to(dtype)) for r in exact]
        found = torch.autograd.grad(found, inputs, grads)
        exact = torch.autograd.grad(exact, exact_inputs, [g.double() for g in grads], allow_unused=True)
        for a, b in zip(found, exact, strict=True):
            b = torch.zeros_like(a, dtype=torch.float64) if b is None else b
            assert a.shape == b.shape and a.dtype == dtype
            scale = max(b.abs().max().item(), *(g.abs().max().item() for g in grads)) * max(1, largest)
            assert_close(a, b, relative * scale)


def assert_close(found: Tensor, exact: Tensor, bound: float) -> None:
    error = (found.double() - exact).abs().max().item() if found.numel() else 0.0
    assert error <= bound, f"error {error:.3g}, at most {bound:.3g} expected"  # NaN fails too
