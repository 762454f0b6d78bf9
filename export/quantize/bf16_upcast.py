"""bfloat16 graphs where ONNX Runtime has no bfloat16 kernels: operators compute in float32, their results are rounded.

That is what a GPU does, with float32 accumulation; so a CPU can check such a graph, slowly.
"""

from __future__ import annotations


def widen(model):
    """A copy of an ONNX model in which bfloat16 values pass through casts; its inputs and outputs stay."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    narrow = {i.name for i in graph.initializer if i.data_type == TensorProto.BFLOAT16}
    values = (*graph.value_info, *graph.input, *graph.output)
    narrow |= {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    nodes, widened = [], {}

    def wide(name: str) -> str:
        if name not in narrow:
            return name
        if name not in widened:
            widened[name] = f"{name}:wide"
            nodes.append(helper.make_node("Cast", [name], [widened[name]], to=TensorProto.FLOAT))
        return widened[name]

    for node in graph.node:
        if node.op_type == "Cast":  # casts have bfloat16 kernels
            nodes.append(node)
            continue
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[:] = [wide(name) for name in node.input]
        changed.output[:] = [f"{name}:exact" if name in narrow else name for name in node.output]
        nodes.append(changed)
        nodes += [
            helper.make_node("Cast", [f"{name}:exact"], [name], to=TensorProto.BFLOAT16)
            for name in node.output
            if name in narrow
        ]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model
