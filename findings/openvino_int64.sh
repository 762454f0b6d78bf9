#!/usr/bin/env bash
# OpenVINO's CPU plugin computes int64 as int32 and float64 as float32, and still calls the results int64 and float64.
#
# Guess, written before the first run: integer arithmetic of an ONNX graph in int64 is exact, or such a graph is
#   refused; a port that says int64 carries 64 bits.
# Versions: openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2, numpy 2.3.5, x86-64.
# Behaviour: 2**31 - 1 plus 1 is negative; an input above 2**31 loses its upper half before the first operation; a sum
#   of four times 2**30 saturates; a float64 difference of 1e-12 is 0 and 1e300 becomes the largest float32. No
#   warning; the outputs' type is int64 and float64. Token positions are small, but seeds, hashes, byte offsets and
#   timestamps inside a graph are not.
# Output seen:
#   add 1 to [2147483647 3000000000]: ONNX Runtime [2147483648 3000000001], OpenVINO [-2147483648 -1294967295] (int64)
#   sum of four 2**30: ONNX Runtime 4294967296, OpenVINO -2147483648
#   float64 [1 + 1e-12, 1e300] minus 1: ONNX Runtime [1.0e-12 1.0e+300], OpenVINO [0.0e+00 3.4e+38] (float64)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.3.5
"$dir/env/bin/python" - <<'PY'
import io

import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper


def both(node, x, shape_out, initializers=()):
    dtype = helper.np_dtype_to_tensor_dtype(x.dtype)
    ports = [helper.make_tensor_value_info("x", dtype, x.shape)], [helper.make_tensor_value_info("y", dtype, shape_out)]
    graph = helper.make_graph([node], "graph", *ports, list(initializers))
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    return session.run(None, {"x": x})[0], core.compile_model(core.read_model(io.BytesIO(data)), "CPU")([x])[0]


one = helper.make_tensor("one", TensorProto.INT64, [], [1])
x = np.array([2**31 - 1, 3_000_000_000])
exact, found = both(helper.make_node("Add", ["x", "one"], ["y"]), x, [2], [one])
print(f"add 1 to {x}: ONNX Runtime {exact}, OpenVINO {found} ({found.dtype})")
assert (exact == x + 1).all() and found.dtype == np.int64
assert (found == (x + 1).astype(np.int32)).all()

total, wrong = both(helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0), np.full(4, 2**30), [])
print(f"sum of four 2**30: ONNX Runtime {total}, OpenVINO {wrong}")
assert total == 2**32 and wrong != 2**32

one = helper.make_tensor("one", TensorProto.DOUBLE, [], [1])
x = np.array([1 + 1e-12, 1e300])
exact, found = both(helper.make_node("Sub", ["x", "one"], ["y"]), x, [2], [one])
text = [np.array2string(value, formatter={"float": "{:.1e}".format}) for value in (exact, found)]
print(f"float64 [1 + 1e-12, 1e300] minus 1: ONNX Runtime {text[0]}, OpenVINO {text[1]} ({found.dtype})")
assert exact[0] > 0 and exact[1] == 1e300
assert found.dtype == np.float64 and found[0] == 0 and found[1] < 1e39
PY
