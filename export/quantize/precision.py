"""Prepare a module for a precision, and choose the blocks that stay in float32 or are not quantized.

| precision     | made by                                                                                              |
|---------------|------------------------------------------------------------------------------------------------------|
| `fp32`        | the trace as it is                                                                                   |
| `fp16` `bf16` | the module cast before tracing, so that the graph is strongly typed                                  |
| `mixed`       | fp16, except for the blocks with the largest error of their own, as few as keep the tolerance        |
| `int8`        | ONNX Runtime: weights quantized by channel ahead, activations by tensor at run time (int8.py)        |
| `int8-static` | ONNX Runtime: ranges of activations calibrated on images (int8.py)                                   |
| `int8-trt`    | a float16 graph with calibrated Q/DQ nodes for TensorRT (qdq.py)                                     |
| `fp8`         | the same with 8-bit floats, for SM 89 and newer                                                      |

INT8 is applied only to products with weights inside blocks: preprocessing has to be exact, and attention's products
cost little and lose much. Most of the error of 8 bits arises in small blocks near the output, so the cheapest blocks
are not quantized; if the check still fails, more of them are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from export.components import PEAK, tolerance
from export.graphs import Graph
from export.verification.layer_drift import compare, reference_outputs
from vlv.common.command import UserError

FREE_SHARE = 0.03  # of a graph's `block_costs`: blocks up to that are never quantized
MAX_SHARE = 0.5  # a graph with a larger share in float32 is no INT8 graph
DTYPES = {"bf16": torch.bfloat16} | dict.fromkeys(("fp16", "mixed", "int8-trt", "fp8"), torch.float16)


class NotPossible(UserError, ValueError):
    """Raised where no choice of blocks keeps the tolerance."""


def prepare(
    reference: Graph, load: Callable[[], Graph], precision: str, sets: list[dict[str, Tensor]]
) -> tuple[Graph, tuple[str, ...]]:
    """Return the module to trace for a precision, and the blocks that stay in float32.

    reference: the float32 module, which `int8` starts from; load: makes another one, to be cast; sets: verification
    inputs by name, for `mixed`. Raises NotPossible.
    """
    if precision == "mixed":
        return _mixed(load, reference, sets)
    dtype = DTYPES.get(precision)
    fp32_blocks = _too_large(reference) if dtype == torch.float16 else ()
    return (load().cast(dtype, fp32_blocks) if dtype else reference), fp32_blocks


def _too_large(reference: Graph) -> tuple[str, ...]:
    """Return the blocks with weights that float16 does not hold. Raises NotPossible for such weights between blocks."""
    large = [name for name, weight in reference.named_parameters() if weight.abs().max() > torch.finfo(torch.half).max]
    for name in large:
        if not name.startswith(tuple(f"{block}." for block in reference.blocks)):
            raise NotPossible(f"{name} has weights above 65,504, where float16 ends: use --precision bf16 or fp32")
    return tuple(block for block in reference.blocks if any(name.startswith(f"{block}.") for name in large))


@torch.inference_mode()
def _mixed(load: Callable[[], Graph], reference: Graph, sets: list[dict[str, Tensor]]) -> tuple[Graph, tuple[str, ...]]:
    """Keep 0, 1, 2, 4 … blocks in float32, those with the largest fp16 error first, until the outputs are exact."""
    expected = [_outputs(reference, inputs) for inputs in sets]
    ranking = sorted(own_errors(reference, load(), sets[0]).items(), key=lambda item: -item[1])
    allowed = tolerance("mixed", len(reference.blocks), reference.longest_sum)
    count = 0
    while True:
        fp32_blocks = tuple(path for path, _ in ranking[:count])
        graph = load().cast(torch.float16, fp32_blocks)
        errors = [
            compare(found, exact)
            for inputs, outputs in zip(sets, expected, strict=True)
            for found, exact in zip(_outputs(graph, inputs), outputs, strict=True)
        ]
        if all(error["rms"] <= allowed and error["max"] <= PEAK * allowed for error in errors):
            return graph, fp32_blocks
        if count >= len(ranking):
            raise NotPossible("mixed: values between the blocks overflow in fp16: use fp32 or bf16")
        count = min(max(1, 2 * count), len(ranking))


def own_errors(reference: Graph, graph: Graph, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Return each block's RMS error in fp16 on float32 inputs, relative to its output's RMS; inf where it overflows."""
    arguments: dict[str, tuple] = {}
    hooks = [
        reference.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: arguments.setdefault(path, (args, kwargs)) and None, with_kwargs=True
        )
        for path in reference.blocks
    ]
    expected = reference_outputs(reference, reference.blocks, inputs)
    for hook in hooks:
        hook.remove()
    graph.cast(torch.float16)
    errors = {}
    for path in reference.blocks:
        args, kwargs = arguments[path]
        found = graph.get_submodule(path)(*_half(args), **{k: _half(v) for k, v in kwargs.items()})
        rms = compare(found if isinstance(found, Tensor) else found[0], expected[path])["rms"]
        errors[path] = rms if np.isfinite(rms) else float("inf")
    return errors


def _half(value):
    if isinstance(value, Tensor):
        return value.half() if value.is_floating_point() else value
    return type(value)(map(_half, value)) if isinstance(value, tuple | list) else value


def _outputs(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = graph(*(inputs[port.name] for port in graph.inputs))
    return (found,) if isinstance(found, Tensor) else found


@torch.inference_mode()
def block_costs(graph: Graph) -> dict[str, float]:
    """Return what each block costs in float32, the cheapest first.

    The cost is the block's share of the weights of linear layers and convolutions, or of the products with them that
    one row takes, whichever is larger.
    """
    layers = {path: module for path, module in graph.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    weights = {path: module.weight.numel() for path, module in layers.items()}
    products = dict.fromkeys(layers, 0)

    def count(path: str):
        def hook(module, args, output):
            products[path] += output.numel() * module.weight[0].numel()

        return hook

    hooks = [module.register_forward_hook(count(path)) for path, module in layers.items()]
    graph(*graph.example(1))
    for hook in hooks:
        hook.remove()

    def share(block: str, numbers: dict[str, int]) -> float:
        return sum(n for path, n in numbers.items() if f"{path}.".startswith(f"{block}.")) / sum(numbers.values())

    costs = {block: max(share(block, weights), share(block, products)) for block in graph.blocks}
    return dict(sorted(costs.items(), key=lambda item: item[1]))


def cheapest_blocks(costs: dict[str, float], allowance: float = FREE_SHARE) -> tuple[str, ...]:
    """Return as many of the cheapest blocks as together cost at most `allowance`; costs: from `block_costs`."""
    sums = itertools.accumulate(costs.values())
    return tuple(block for block, total in zip(costs, sums, strict=True) if total <= allowance)


def exclusion_candidates(costs: dict[str, float]) -> list[tuple[str, ...]]:
    """Return the blocks to leave unquantized, and those to try where that fails, for twice the allowance each time."""
    allowances = itertools.takewhile(lambda a: a <= MAX_SHARE, (FREE_SHARE * 2**i for i in itertools.count()))
    return list(dict.fromkeys(cheapest_blocks(costs, allowance) for allowance in allowances))
