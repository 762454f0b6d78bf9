#!/usr/bin/env bash
# A graph with 4-bit weights and float activations is run by ONNX Runtime with 8-bit activations.
#
# Guess, written before the first run: DequantizeLinear of constant weights followed by a float32 MatMul is a float32
#   product (weight-only quantization), to about 1e-6 whatever the graph optimizations do.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.3.5, x86-64 with AVX2 or more.
# Behaviour: from the extended level on, both nodes become one MatMulNBits with accuracy_level 4, which rounds each
#   block of the activations to 8 bits: the error grows from 4e-7 to half a percent and more. INT8 weights are taken
#   as well. One activation a thousand times the others (usual in language models) pushes its block's neighbours to
#   zero. No warning: the session option session.qdq_matmulnbits_accuracy_level, which is 4 unless it is set, is the
#   only sign. With 1 the fused product is float32 again.
# Output seen (relative RMS error against float64; level 1 is session.qdq_matmulnbits_accuracy_level = 1):
#   INT4: optimizations off 3e-07, all 5e-03, all at level 1 3e-07
#   INT8: optimizations off 3e-07, all 5e-03, all at level 1 3e-07
#   INT4, the 31 neighbours of an outlier: off 3e-05, all 1e+00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.3.5
"$dir/env/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 256, 64, 32
OFF, ALL = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
rng = np.random.default_rng(0)


def error(dtype, x, level, accuracy=None, ignore=None):
    """Return the relative RMS error of x @ dequantized weights; `ignore` is a column whose part is subtracted."""
    high = 8 if dtype == TensorProto.INT4 else 128
    generator = np.random.default_rng(1)
    weights = generator.integers(-high, high, (K, N))
    scales = (generator.random((K // BLOCK, N)) / 100 + 0.01).astype(np.float32)
    exact = weights * np.repeat(scales, BLOCK, 0).astype(np.float64)
    nodes = [
        helper.make_node("DequantizeLinear", ["weights", "scales"], ["dense"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "dense"], ["y"]),
    ]
    constants = [
        helper.make_tensor("weights", dtype, [K, N], weights.flatten().tolist()),
        numpy_helper.from_array(scales, "scales"),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", K), ("y", N))]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    if accuracy is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0].astype(np.float64)
    expected = x.astype(np.float64) @ exact
    if ignore is not None:
        part = x[:, [ignore]].astype(np.float64) @ exact[[ignore]]
        found, expected = found - part, expected - part
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


x = rng.standard_normal((16, K)).astype(np.float32)
for dtype in (TensorProto.INT4, TensorProto.INT8):
    off, full, level1 = error(dtype, x, OFF), error(dtype, x, ALL), error(dtype, x, ALL, accuracy=1)
    name = TensorProto.DataType.Name(dtype)
    print(f"{name}: optimizations off {off:.0e}, all {full:.0e}, all at level 1 {level1:.0e}")
    assert off < 1e-5 and level1 < 1e-5
    assert full > 1e-3

block = np.zeros_like(x)
block[:, :BLOCK] = x[:, :BLOCK]
block[:, 5] = 1000
off, full = (error(TensorProto.INT4, block, level, ignore=5) for level in (OFF, ALL))
print(f"INT4, the {BLOCK - 1} neighbours of an outlier: off {off:.0e}, all {full:.0e}")
assert off < 1e-3
assert full > 0.5
PY
