"""FP8 in PyTorch: the linear layers of the vision tower multiply 8-bit floats (kernels/fp8_linear.py).

Which blocks do is a fixed rule, so a checkpoint remembers nothing and loading measures nothing: the stages of the
vision tower, which have 80 % of the published encoder's products with weights. The blocks behind them stay exact: their
rounding reaches the embeddings undamped. `benchmarks/fp8_captions.py` measures this rule beside that of INT8
(export/quantize/precision.py).
"""

from __future__ import annotations

from torch import nn

from export.graphs import Graph
from kernels.fp8_linear import Fp8Linear

STAGES = "encoder.vision.stages."


def exact_blocks(graph: Graph) -> tuple[str, ...]:
    """Return the blocks of an encoder that are not quantized."""
    return tuple(block for block in graph.blocks if not block.startswith(STAGES))


def to_fp8(graph: Graph, excluded_blocks: tuple[str, ...] | None = None) -> Graph:
    """Replace the linear layers inside the graph's blocks, after `cast` and in place, and return the graph.

    excluded_blocks: those that stay as they are; None: `exact_blocks`. Convolutions and attention's own products stay.
    """
    excluded = exact_blocks(graph) if excluded_blocks is None else excluded_blocks
    for block in graph.blocks:
        if block not in excluded:
            _replace(graph.get_submodule(block))
    return graph


def _replace(block: nn.Module) -> None:
    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and Fp8Linear.takes(layer):
                setattr(parent, name, Fp8Linear(layer, getattr(layer, "gelu", False)))
        first, second = getattr(parent, "fc1", None), getattr(parent, "fc2", None)
        if isinstance(first, Fp8Linear) and isinstance(second, Fp8Linear) and first.gelu:
            first.gelu, second.gelu_before = False, True  # in the kernel that quantizes: one pass less over the map
