"""A module to an ONNX file: traced by torch.export with a dynamic batch, constants folded, blocks located."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.components import Batch, Port
from export.graphs import Graph

# Bytes of weights above which they get a file of their own. protobuf ends at 2 GiB; but from such a file a runtime maps
# the weights, and takes half the memory to load them that it takes for weights inside the graph.
EXTERNAL = 1 << 26
TRACED = 5  # batch while tracing: neither 1, which would be specialised, nor a size of anything else
_FOLDED = 1 << 31  # largest constant that folding may make, in numbers


@dataclass(frozen=True)
class Traced:
    """What was written, and where the modules of the source ended up in it."""

    files: list[str]  # the graph, and the weights where they are apart
    blocks: dict[str, str]  # path of a block -> the value that it ends with
    owner: dict[str, str | None]  # node -> path of its block; None: preprocessing, sums between blocks


def to_onnx(graph: Graph, file: Path, profile: Batch, opset: int, nodes: bool = False) -> Traced:
    """Write `graph` as ONNX, its batch dynamic. With `nodes`, our operations are functions (export/plugins.py)."""
    import onnx_ir

    from export import plugins
    from kernels.runtime.dispatch import as_nodes
    from kernels.tensorrt.onnx_nodes import translations

    axis = torch.export.Dim("batch", min=profile.least, max=max(profile.most, TRACED))
    shapes = [{0: axis} if port.batched else {} for port in graph.inputs]
    if (fixed := _positional(graph)) < len(shapes):
        shapes[fixed:] = [tuple(shapes[fixed:])]  # *kv
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), as_nodes() if nodes else nullcontext():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            graph.example(TRACED),
            dynamo=True,
            opset_version=opset,
            input_names=[port.name for port in graph.inputs],
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(shapes),
            custom_translation_table=translations() if nodes else None,
            verbose=False,
        )
    model = program.model
    _fold(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    _require_dynamic(model, graph)
    owner = owners(model, graph.blocks)
    blocks = {path: node.outputs[0].name for node, path in owner.items() if path}  # the last one stays
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # source paths of the machine that exported
    if nodes:
        plugins.add_bodies(model, opset)
    weights = (value.const_value.nbytes for value in model.graph.initializers.values())
    external = f"{file.name}.data" if is_large(weights) else None
    onnx_ir.save(model, file, external_data=external)
    names = {node.name: path for node, path in owner.items()}
    return Traced([file.name, *([external] if external else [])], blocks, names)


def is_large(sizes: Iterable[int]) -> bool:
    """Whether weights of these sizes in bytes get a file of their own."""
    return sum(sizes) > EXTERNAL


def _fold(model) -> None:
    """Compute what depends on no input; with torch's own limits, weights would be transposed at every load."""
    from onnxscript import optimizer

    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
    found = True
    while found:
        optimizer.fold_constants(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
        # the optimizer leaves LayerNormalization, which may have further outputs, and so all that follows from it
        constant = lambda value: value is not None and value.const_value is not None  # noqa: E731
        found = [n for n in model.graph if n.op_type == "LayerNormalization" and all(map(constant, n.inputs))]
        for node in found:
            inputs = [*node.inputs, None][:3]
            _replace(model, node, _layer_norm(*(v and v.const_value.numpy() for v in inputs), node.attributes))


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, attributes) -> np.ndarray:
    wide = x.astype(np.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + attributes.get_float("epsilon", 1e-5))
    scaled = centred / deviation * weight.astype(np.float32)
    return (scaled if bias is None else scaled + bias.astype(np.float32)).astype(x.dtype)


def _replace(model, node, result: np.ndarray) -> None:
    """Make a node's first output a constant."""
    import onnx_ir

    old = node.outputs[0]
    value = onnx_ir.Value(
        name=f"{old.name}_constant", shape=onnx_ir.Shape(result.shape), type=onnx_ir.TensorType(old.dtype)
    )
    value.const_value = onnx_ir.tensor(result, name=value.name)
    model.graph.register_initializer(value)
    old.replace_all_uses_with(value)
    model.graph.remove(node, safe=True)


def _positional(graph: Graph) -> int:
    """Inputs before a variadic one."""
    code = type(graph).forward.__code__
    return code.co_argcount - 1


def _require_dynamic(model, graph: Graph) -> None:
    """torch.onnx.export falls back to a fixed batch, silently, where the code of a module asks for a number."""
    for port, value in zip(graph.inputs, model.graph.inputs, strict=True):
        if port.batched and isinstance(value.shape[0], int):
            raise RuntimeError(f"{type(graph).__name__} fixes the batch of {port.name} at {value.shape[0]} in its code")


def owners(model, blocks: tuple[str, ...]) -> dict:
    """Every node of the graph, in order, and the path of the block that it came from, or None."""
    found = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        inside = [path for path in blocks if any(s == path or s.startswith(f"{path}.") for s in scopes)]
        found[node] = inside[0] if inside else None
    return found


def output_ports(file: Path, batch: str = "batch") -> tuple[Port, ...]:
    """The outputs of an ONNX file; their first axis is the batch."""
    import onnx

    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT32: "int32", onnx.TensorProto.UINT8: "uint8"}
    model = onnx.load(file, load_external_data=False)
    ports = []
    for value in model.graph.output:
        kind = value.type.tensor_type
        ports.append(Port(value.name, kinds[kind.elem_type], tuple(d.dim_value for d in kind.shape.dim[1:])))
    return tuple(ports)
