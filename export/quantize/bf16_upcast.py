"""Run bfloat16 graphs where ONNX Runtime has no bfloat16 kernels: compute in float32, round every result.

A GPU does the same with float32 accumulation, so a CPU can check such a graph, slowly.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, helper


def upcast(model: ModelProto) -> ModelProto:
    """Return a copy of a model whose operators compute in float32 between casts; its inputs and outputs stay."""
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    bf16 = {i.name for i in graph.initializer if i.data_type == TensorProto.BFLOAT16}
    values = (*graph.value_info, *graph.input, *graph.output)
    bf16 |= {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    nodes, float32 = [], {}

    def float32_of(name: str) -> str:
        if name not in bf16:
            return name
        if name not in float32:
            float32[name] = f"{name}:float32"
            nodes.append(helper.make_node("Cast", [name], [float32[name]], to=TensorProto.FLOAT))
        return float32[name]

    for node in graph.node:
        if node.op_type == "Cast":  # casts have bfloat16 kernels
            nodes.append(node)
            continue
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[:] = [float32_of(name) for name in node.input]
        changed.output[:] = [f"{name}:unrounded" if name in bf16 else name for name in node.output]
        nodes.append(changed)
        nodes += [
            helper.make_node("Cast", [f"{name}:unrounded"], [name], to=TensorProto.BFLOAT16)
            for name in node.output
            if name in bf16
        ]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model
