#!/usr/bin/env bash
# ONNX Runtime's CPU provider computes float16 graphs in float32 between the nodes, so an overflow does not show.
#
# Guess, written before the first run: a tensor that the graph declares float16 is rounded to float16 after its node,
#   if not by fusion then at least with all optimizations off; 60000 * 2 / 2 is then infinity, as in PyTorch and NumPy.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.3.5, torch 2.13.0, x86-64.
# Behaviour: nodes without a float16 kernel run in float32 between two Casts, and the Casts between neighbours are
#   removed at every level, ORT_DISABLE_ALL too: 60000 * 2 / 2 is 60000, and attention scores of 120000 scaled by 1/8
#   give a proper softmax. Only when the middle tensor is itself an output is it infinity, and the final result stays
#   finite. A float16 export that a GPU turns into NaN passes its check against PyTorch float32 on the CPU.
# Output seen:
#   60000 * 2 / 2 in float16: NumPy inf, PyTorch inf, ONNX Runtime 60000 (disabled), 60000 (all)
#   scores [300 * 400, 0] / 8, softmax: PyTorch [nan nan], ONNX Runtime [1 0]
#   the same with the product as an output: product inf, quotient 60000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.3.5 torch==2.13.0
"$dir/env/bin/python" -W ignore - <<'PY'
import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

HALF = TensorProto.FLOAT16
OFF, ALL = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def run(nodes, inputs, outputs, constants, level):
    ports = [helper.make_tensor_value_info(name, HALF, x.shape) for name, x in inputs.items()]
    results = [helper.make_tensor_value_info(name, HALF, None) for name in outputs]
    initializers = [helper.make_tensor(name, HALF, [], [value]) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", ports, results, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


x = np.array([60000], np.float16)
nodes = [helper.make_node("Mul", ["x", "two"], ["product"]), helper.make_node("Div", ["product", "two"], ["y"])]
in_numpy = (x * np.float16(2) / np.float16(2))[0]
in_torch = (torch.from_numpy(x) * 2 / 2)[0].item()
off, full = (run(nodes, {"x": x}, ["y"], {"two": 2.0}, level)[0][0] for level in (OFF, ALL))
print(
    f"60000 * 2 / 2 in float16: NumPy {in_numpy}, PyTorch {in_torch}, "
    f"ONNX Runtime {off:g} (disabled), {full:g} (all)"
)
assert np.isinf(in_numpy) and np.isinf(in_torch)
assert off == full == 60000

q, k = np.array([[300]], np.float16), np.array([[400, 0]], np.float16)
nodes_attention = [
    helper.make_node("MatMul", ["q", "k"], ["scores"]),
    helper.make_node("Div", ["scores", "eight"], ["scaled"]),
    helper.make_node("Softmax", ["scaled"], ["y"], axis=-1),
]
expected = ((torch.from_numpy(q) @ torch.from_numpy(k)) / 8).softmax(-1)[0].numpy()
found = run(nodes_attention, {"q": q, "k": k}, ["y"], {"eight": 8.0}, OFF)[0][0]
text = [" ".join(f"{value:g}" for value in row) for row in (expected, found)]
print(f"scores [300 * 400, 0] / 8, softmax: PyTorch [{text[0]}], ONNX Runtime [{text[1]}]")
assert np.isnan(expected).all()
assert found.tolist() == [1, 0]

product, quotient = run(nodes, {"x": x}, ["product", "y"], {"two": 2.0}, ALL)
print(f"the same with the product as an output: product {product[0]:g}, quotient {quotient[0]:g}")
assert np.isinf(product[0]) and quotient[0] == 60000
PY
