#!/usr/bin/env bash
# One number too large for FP8, four libraries, three answers; the standard's saturate flag is ignored by one of them.
#
# Guess, written before the first run: a cast to float8_e4m3fn or float8_e5m2 beyond the largest number does the same
#   in PyTorch, ml_dtypes (JAX, NumPy), ONNX Runtime and OpenVINO; what ONNX lets one choose (saturate) is honoured.
# Versions: torch 2.13.0, ml_dtypes 0.6.0, onnx 1.23.2, onnxruntime 1.32.0, openvino 2026.4.1, numpy 2.3.5, x86-64.
# Behaviour: float8_e4m3fn saturates in PyTorch, infinity included, and is NaN in ml_dtypes. float8_e5m2 is infinity
#   in both: PyTorch saturates one FP8 format and not the other. ONNX Runtime saturates both when saturate=1, the value
#   that exporters leave; so an exported float8_e5m2 graph hides an infinity that the PyTorch module shows. OpenVINO
#   reads the attribute and does as if saturate=0 in either case. Of a NaN all four make NaN.
# Output seen (casts of 1000000 and of infinity):
#   float8_e4m3fn
#     PyTorch 448 448, ml_dtypes nan nan
#     ONNX Runtime saturate=1 448 448, saturate=0 nan nan, OpenVINO saturate=1 nan nan, saturate=0 nan nan
#   float8_e5m2
#     PyTorch inf inf, ml_dtypes inf inf
#     ONNX Runtime saturate=1 57344 57344, saturate=0 inf inf, OpenVINO saturate=1 inf inf, saturate=0 inf inf
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 numpy==2.3.5
"$dir/env/bin/python" -W ignore - <<'PY'
import io

import ml_dtypes
import numpy as np
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper

ONNX_TYPES = {"float8_e4m3fn": TensorProto.FLOAT8E4M3FN, "float8_e5m2": TensorProto.FLOAT8E5M2}


def graph(name, saturate):
    nodes = [
        helper.make_node("Cast", ["x"], ["eight"], to=ONNX_TYPES[name], saturate=saturate),
        helper.make_node("Cast", ["eight"], ["y"], to=TensorProto.FLOAT),
    ]
    ports = [helper.make_tensor_value_info(port, TensorProto.FLOAT, [3]) for port in "xy"]
    proto = helper.make_graph(nodes, "graph", ports[:1], ports[1:])
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def in_onnxruntime(data, x):
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def in_openvino(data, x):
    core = openvino.Core()
    return core.compile_model(core.read_model(io.BytesIO(data)), "CPU")([x])[0]


x = np.array([1e6, np.inf, np.nan], np.float32)
seen = {}
for name in ONNX_TYPES:
    results = {
        "PyTorch": torch.from_numpy(x).to(getattr(torch, name)).float().numpy(),
        "ml_dtypes": x.astype(getattr(ml_dtypes, name)).astype(np.float32),
        "ONNX Runtime saturate=1": in_onnxruntime(graph(name, 1), x),
        "saturate=0": in_onnxruntime(graph(name, 0), x),
        "OpenVINO saturate=1": in_openvino(graph(name, 1), x),
        "saturate=0 ": in_openvino(graph(name, 0), x),
    }
    assert all(np.isnan(y[2]) for y in results.values())
    seen[name] = [" ".join(f"{value:g}" for value in y[:2]) for y in results.values()]
    parts = [f"{label.strip()} {values}" for label, values in zip(results, seen[name], strict=True)]
    print(name, ", ".join(parts[:2]), ", ".join(parts[2:]), sep="\n  ")
assert seen == {
    "float8_e4m3fn": ["448 448", "nan nan", "448 448", "nan nan", "nan nan", "nan nan"],
    "float8_e5m2": ["inf inf", "inf inf", "57344 57344", "inf inf", "inf inf", "inf inf"],
}
PY
