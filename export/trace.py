"""Write a module as an ONNX file: traced by torch.export with a dynamic batch, constants folded, blocks located."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import optimizer, rewriter

from export.components import Batch, Port
from export.graphs import Graph
from kernels.runtime.dispatch import as_nodes
from kernels.tensorrt.onnx_nodes import translations

# Bytes of weights above which they get a file of their own. protobuf ends at 2 GiB; and a runtime maps the weights of
# such a file, which takes half the memory that loading them from inside the graph takes.
EXTERNAL = 1 << 26
TRACED_BATCH = 5  # batch while tracing: neither 1, which would be specialised, nor any other size in the model
_FOLDED = 1 << 31  # largest constant that folding may make, in numbers
# its matcher goes through the whole graph at every node (onnxscript 0.7.2): half of the optimizer's time, and more of a
# larger graph's; none of our graphs has the slices that it joins
_SLOW_RULE = "SlicesSplit"


@dataclass(frozen=True)
class Traced:
    """The files that were written, and where the modules of the source are in the graph."""

    files: list[str]  # the graph, and the weights where they are apart
    blocks: dict[str, str]  # path of a block -> the value that is its output
    owner: dict[str, str | None]  # node -> path of its block; None: preprocessing, sums between blocks


def to_onnx(
    graph: Graph, file: Path, profile: Batch, opset: int, add_bodies: Callable[[onnx_ir.Model, int], None] | None = None
) -> Traced:
    """Write `graph` as ONNX with a dynamic batch.

    add_bodies: keep our operations as nodes of our domain, which this function gives their bodies (export/plugins.py).
    """
    nodes = add_bodies is not None
    axis = torch.export.Dim("batch", min=profile.min, max=max(profile.max, TRACED_BATCH))
    shapes = [{0: axis} if port.batched else {} for port in graph.inputs]
    if (fixed := _positional(graph)) < len(shapes):
        shapes[fixed:] = [tuple(shapes[fixed:])]  # *kv
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), as_nodes() if nodes else nullcontext():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            graph.example(TRACED_BATCH),
            dynamo=True,
            opset_version=opset,
            input_names=[port.name for port in graph.inputs],
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(shapes),
            custom_translation_table=translations() if nodes else None,
            verbose=False,
            optimize=False,
        )
    model = program.model
    _optimize(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    _require_dynamic(model, graph)
    owner = owners(model, graph.blocks)
    blocks = {path: node.outputs[0].name for node, path in owner.items() if path}  # the last node of a block stays
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # source paths of this machine
    if add_bodies:
        add_bodies(model, opset)
    weights = (value.const_value.nbytes for value in model.graph.initializers.values())
    external = f"{file.name}.data" if is_large(weights) else None
    onnx_ir.save(model, file, external_data=external)
    names = {node.name: path for node, path in owner.items()}
    return Traced([file.name, *([external] if external else [])], blocks, names)


def is_large(sizes: Iterable[int]) -> bool:
    """Return True if weights of these sizes in bytes get a file of their own."""
    return sum(sizes) > EXTERNAL


def _optimize(model) -> None:
    """Simplify the graph, and fold constants, larger ones than torch folds: else every load would transpose weights."""
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
    rewriter._DEFAULT_REWRITE_RULES = tuple(r for r in rewriter._DEFAULT_REWRITE_RULES if r.name != _SLOW_RULE)
    optimizer.optimize_ir(model, num_iterations=1)  # a second one, torch's default, costs time and changes nothing
    found = True
    while found:
        optimizer.fold_constants(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
        # the optimizer leaves LayerNormalization, which may have further outputs, and everything that depends on it
        constant = lambda value: value is not None and value.const_value is not None  # noqa: E731
        found = [n for n in model.graph if n.op_type == "LayerNormalization" and all(map(constant, n.inputs))]
        for node in found:
            inputs = [*node.inputs, None][:3]
            _replace(model, node, _layer_norm(*(v and v.const_value.numpy() for v in inputs), node.attributes))


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, attributes) -> np.ndarray:
    x32 = x.astype(np.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + attributes.get_float("epsilon", 1e-5))
    scaled = centred / deviation * weight.astype(np.float32)
    return (scaled if bias is None else scaled + bias.astype(np.float32)).astype(x.dtype)


def _replace(model, node, result: np.ndarray) -> None:
    """Replace a node's first output by a constant."""
    old = node.outputs[0]
    value = onnx_ir.Value(
        name=f"{old.name}_constant", shape=onnx_ir.Shape(result.shape), type=onnx_ir.TensorType(old.dtype)
    )
    value.const_value = onnx_ir.tensor(result, name=value.name)
    model.graph.register_initializer(value)
    old.replace_all_uses_with(value)
    model.graph.remove(node, safe=True)


def _positional(graph: Graph) -> int:
    """Return the number of inputs before a variadic one."""
    code = type(graph).forward.__code__
    return code.co_argcount - 1


def _require_dynamic(model, graph: Graph) -> None:
    """Raise RuntimeError where the batch is fixed: torch.onnx.export does so silently if a module asks for a number."""
    for port, value in zip(graph.inputs, model.graph.inputs, strict=True):
        if port.batched and isinstance(value.shape[0], int):
            raise RuntimeError(f"{type(graph).__name__} fixes the batch of {port.name} at {value.shape[0]} in its code")


def owners(model, blocks: tuple[str, ...]) -> dict:
    """Return every node of the graph in order, with the path of the block that it came from, or None."""
    found = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        inside = [path for path in blocks if any(s == path or s.startswith(f"{path}.") for s in scopes)]
        found[node] = inside[0] if inside else None
    return found


def output_ports(file: Path) -> tuple[Port, ...]:
    """Return the outputs of an ONNX file; their first axis is the batch."""
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT32: "int32", onnx.TensorProto.UINT8: "uint8"}
    model = onnx.load(file, load_external_data=False)
    ports = []
    for value in model.graph.output:
        kind = value.type.tensor_type
        ports.append(Port(value.name, kinds[kind.elem_type], tuple(d.dim_value for d in kind.shape.dim[1:])))
    return tuple(ports)
