#!/usr/bin/env bash
# TensorRT-RTX builds for Turing GPUs, lists them as a target, and refuses every float32 matrix product for them.
#
# Guess, written before the first run: a float32 network that builds for Ampere builds for Turing (SM 75), a supported
#   target; float32 is the format that every GPU computes, and only bfloat16, which Turing's hardware lacks, fails.
# Versions: tensorrt-rtx 1.7.1.116 (CUDA 13 wheels), onnx 1.23.2, numpy 2.3.5, Linux x86-64. No GPU is used: engines
#   are built for a named compute capability.
# Behaviour: for SM 75 the builder takes float32 elementwise operations and float16 products, and returns no engine for
#   a float32 MatMul ("FP32 GEMM is not supported"). The parser accepts the graph. So a model whose
#   float32 engine serves SM 80 and later has to be float16 for a T4 or an RTX 20 card.
# Output seen:
#   SM75: float32 relu built, float32 matmul refused, float16 matmul built, bfloat16 matmul refused
#   SM80: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   SM89: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   SM120: float32 relu built, float32 matmul built, float16 matmul built, bfloat16 matmul built
#   SM75's reason: FP32 GEMM is not supported
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116 \
    onnx==1.23.2 numpy==2.3.5
"$dir/env/bin/python" - <<'PY'
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


for sm in (75, 80, 89, 120):
    cases = ("float32", "Relu"), ("float32", "MatMul"), ("float16", "MatMul"), ("bfloat16", "MatMul")
    built = [build(sm, op, dtype) for dtype, op in cases]
    words = (f"{d} {op.lower()} {'built' if ok else 'refused'}" for (d, op), ok in zip(cases, built, strict=True))
    print(f"SM{sm}:", ", ".join(words))
    assert built == ([True, False, True, False] if sm == 75 else [True] * 4)
reason = "FP32 GEMM is not supported"
assert any("SM75" in message and reason in message for message in log.errors)
print("SM75's reason:", reason)
PY
