#!/usr/bin/env bash
# TensorRT-RTX 1.7 still lists Turing GPUs as a target and no longer builds any float32 matrix product for them.
#
# Guess, written before the first run: a float32 network that builds for Ampere builds for Turing (SM 75), a supported
#   target; float32 is the format that every GPU computes, and only bfloat16, which Turing's hardware lacks, fails.
# Versions: tensorrt-rtx 1.6.1.120 and 1.7.1.116 (CUDA 13 wheels), onnx 1.23.2, numpy 2.3.5, Linux x86-64. No GPU is
#   used: engines are built for a named compute capability.
# Behaviour: 1.6.1 builds a float32 MatMul for SM 75. 1.7.1 has the same list of targets, its parser takes the graph, it
#   builds float32 elementwise operations and float16 products, and returns no engine for the float32 MatMul ("FP32 GEMM
#   is not supported"). A minor upgrade so ends float32 models on T4 and RTX 20 cards.
# Output seen:
#   1.6.1.120 SM75: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul refused
#   1.6.1.120 SM80: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   1.6.1.120 SM120: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   1.7.1.116 SM75: float32 relu built, float32 matmul refused, float16 matmul built, bfloat16 matmul refused
#   1.7.1.116 SM80: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   1.7.1.116 SM120: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   1.7.1.116 SM75's reason: FP32 GEMM is not supported
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/build.py" <<'PY'
import sys

import numpy as np
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity == trt.ILogger.ERROR:
            self.errors.append(message)


log = Log()


def build(sm, op, dtype):
    x, y = (helper.make_tensor_value_info(name, DTYPES[dtype], [16, 64]) for name in "xy")
    weight = helper.make_tensor("w", DTYPES[dtype], [64, 64], np.eye(64).flatten())
    inputs, weights = (["x", "w"], [weight]) if op == "MatMul" else (["x"], [])
    graph = helper.make_graph([helper.make_node(op, inputs, ["y"])], "graph", [x], [y], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(proto.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    return builder.build_serialized_network(network, config) is not None


version = sys.argv[1]
for sm in (75, 80, 120):
    cases = ("float32", "Relu"), ("float32", "MatMul"), ("float16", "MatMul"), ("bfloat16", "MatMul")
    built = [build(sm, op, dtype) for dtype, op in cases]
    words = (f"{d} {op.lower()} {'built' if ok else 'refused'}" for (d, op), ok in zip(cases, built, strict=True))
    print(f"{version} SM{sm}:", ", ".join(words))
    expected = [True, version < "1.7", True, False] if sm == 75 else [True] * 4
    assert built == expected, (built, expected)
reason = "FP32 GEMM is not supported"
assert any("SM75" in message and reason in message for message in log.errors) == (version > "1.7")
if version > "1.7":
    print(f"{version} SM75's reason: {reason}")
PY
for version in 1.6.1.120 1.7.1.116; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install --quiet tensorrt-rtx-cu13-libs=="$version" tensorrt-rtx-cu13-bindings=="$version" \
        onnx==1.23.2 numpy==2.3.5
    "$dir/$version/bin/python" "$dir/build.py" "$version"
done
