"""Export the operations as ONNX nodes of the domain `vlv`, which a runtime's plugins run.

    with dispatch.as_nodes():
        torch.onnx.export(module, …, dynamo=True, custom_translation_table=translations())

A node has the operation's tensors as inputs and its numbers as attributes. Where an operation's tensors are transposed
views (attention's heads), the node's have the order in memory, and the graph's own transpositions cancel. TensorRT's
plugins take no 8-bit images; they take float16, which holds every grey level exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from kernels import attention as attn
from kernels import channel_attention as channel
from kernels import cross_attention as cross
from kernels import dwconv_norm as dwconv
from kernels import upsample_normalize
from kernels import window_attention as window

DOMAIN = "vlv"
FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # ONNX's numbers of the kernels' dtypes
_TYPES = {"int": int, "float": float, "bool": bool, "ScalarType": FLOATS.__getitem__}


@dataclass(frozen=True)
class Operation:
    """One operation: its custom op, its reference, and the order of a 4-axis tensor's axes in memory."""

    op: torch.library.CustomOpDef
    reference: Callable
    order: tuple[int, ...] = (0, 1, 2, 3)

    @cached_property
    def arguments(self) -> dict[str, Callable | None]:
        """Return the arguments in order, by name: None for a tensor, else the conversion from the node's attribute."""
        return {a.name: _TYPES.get(str(a.real_type)) for a in self.op._opoverload._schema.arguments}

    @property
    def tensors(self) -> list[str]:
        return [name for name, kind in self.arguments.items() if kind is None]

    def call(self, function: Callable, tensors: list, attributes: dict[str, int | float]):
        """Call a function of `op`'s arguments on a node's inputs and attributes; return its results as a tuple."""
        given, attributes = iter(tensors), dict(attributes)
        kinds = self.arguments.items()
        found = function(*(self.laid(next(given)) if k is None else k(attributes[name]) for name, k in kinds))
        return tuple(map(self.laid, found if isinstance(found, tuple) else (found,)))

    def laid(self, x: torch.Tensor) -> torch.Tensor:
        """Convert between an operation's tensor and its node's, both ways: the order is its own inverse."""
        return x.permute(self.order) if x.ndim == 4 and self.order != (0, 1, 2, 3) else x


OPERATIONS = {
    "window_attention": Operation(window.window_attention_op, window.window_attention_reference),
    "channel_attention": Operation(channel.channel_attention_op, channel.channel_attention_reference),
    "dwconv_norm": Operation(dwconv.dwconv_norm_op, dwconv.dwconv_norm_reference),
    "attention": Operation(attn.attention_op, attn.attention_reference, (0, 2, 1, 3)),
    "cross_attention": Operation(cross.cross_attention_op, cross.cross_attention_reference),
    "upsample_normalize": Operation(
        upsample_normalize.upsample_normalize_op, upsample_normalize.upsample_normalize_reference
    ),
}


def translations() -> dict[Callable, Callable]:
    """Return the `custom_translation_table` of torch.onnx.export. Needs onnx and onnxscript."""
    return {one.op._opoverload: _translation(name, one) for name, one in OPERATIONS.items()}


def _translation(name: str, operation: Operation) -> Callable:
    from onnx.defs import OpSchema
    from onnxscript import ir, opset20
    from onnxscript.values import Op, Opset

    numbers = {n: kind for n, kind in operation.arguments.items() if kind is not None}
    results = len(operation.op._opoverload._schema.returns)
    floats = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16")]
    letters = [f"T{i}" for i in range(len(operation.tensors) + results)]  # each may have a type of its own
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(n, t) for n, t in zip(operation.tensors, letters, strict=False)],
        outputs=[OpSchema.FormalParameter(f"out_{i}", t) for i, t in enumerate(letters[len(operation.tensors) :])],
        type_constraints=[(letter, floats, "what the kernels take") for letter in letters],
        attributes=[
            OpSchema.Attribute(n, OpSchema.AttrType.FLOAT if kind is float else OpSchema.AttrType.INT, required=True)
            for n, kind in numbers.items()
        ],
    )
    node = Op(Opset(DOMAIN, 1), name, schema)

    def translate(*args):
        given = dict(zip(operation.arguments, args, strict=True))
        attributes = {n: given[n] if kind is float else int(given[n]) for n, kind in numbers.items()}
        tensors = [given[n] for n in operation.tensors]
        tensors = [opset20.Cast(x, to=ir.DataType.FLOAT16) if x.dtype == ir.DataType.UINT8 else x for x in tensors]
        if operation.order == (0, 1, 2, 3):
            return node(*tensors, **attributes)
        first, *others = node(*(opset20.Transpose(x, perm=operation.order) for x in tensors), **attributes)
        return opset20.Transpose(first, perm=operation.order), *others

    return translate
