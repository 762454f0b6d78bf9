"""Measure ranges of activations for INT8 and FP8: equal to ONNX Runtime's own calibration, in a fraction of its memory.

ONNX Runtime's calibration holds the weights several times, and every observed tensor until the end of a run: 24 GB were
not enough for an encoder of 1 B parameters. Here the weights stay in their file, and a tensor is freed once it has been
observed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

from vlv.common.command import UserError

ENDS = ("ReduceMin", "ReduceMax")
FINITE = "Finite"  # 0 times each value, summed: NaN unless all are finite. ReduceMin and ReduceMax may lose a NaN.


class CalibrationError(UserError, ValueError):
    """Raised where an activation is not finite."""


def ranges(graph: Path, kinds: Iterable[str], rows: Iterable[dict[str, np.ndarray]]) -> TensorsData:
    """Return the smallest and largest value, over all `rows` of inputs, of the inputs and outputs of nodes of `kinds`.

    graph: a float32 or float16 ONNX file; a file is made beside it for a while, since both read the same weights.
    Raises CalibrationError for values that are not finite.
    """
    observed = graph.with_name(f"observed-{graph.name}")
    try:
        names = _observe(graph, set(kinds), observed)
        session = open_unoptimized(observed)
        found = [session.run([f"{name}_{end}" for end in (*ENDS, FINITE) for name in names], row) for row in rows]
    finally:
        observed.unlink(missing_ok=True)
    low, high, finite = np.split(np.array(found), 3, axis=1)  # each [rows, tensors]
    if not_finite := [name for name, sums in zip(names, finite.T, strict=True) if np.isnan(sums).any()]:
        raise CalibrationError(
            f"{not_finite[0]} and {len(not_finite) - 1} more tensors are not finite on the calibration images: "
            "choose fp32, or bf16 if they overflow in float16"
        )
    low, high = low.min(0)[:, None], high.max(0)[:, None]  # [tensors, 1], the shape that quantize_static expects
    return TensorsData(CalibrationMethod.MinMax, {name: (low[i], high[i]) for i, name in enumerate(names)})


def _observe(graph: Path, kinds: set[str], observed: Path) -> list[str]:
    """Write the graph with each tensor's ends as outputs; return the tensors in the order of their computation."""
    onnx.shape_inference.infer_shapes_path(graph, observed)
    model = onnx.load(observed, load_external_data=False)
    body = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*body.input, *body.value_info, *body.output)}
    weights = {w.name for w in body.initializer}
    typed = {n for n, k in types.items() if k in (TensorProto.FLOAT, TensorProto.FLOAT16)} - weights
    at_work = [node for node in body.node if node.op_type in kinds]
    names = list(dict.fromkeys(name for node in at_work for name in (*node.input, *node.output) if name in typed))
    body.initializer.append(helper.make_tensor("observed_zero", TensorProto.FLOAT, [], [0.0]))
    # in reverse: ONNX Runtime visits ends without successors from the last one, and frees what nothing waits for
    for name in reversed(names):
        float32 = name
        if types[name] == TensorProto.FLOAT16:
            float32 = f"{name}_float32"
            body.node.append(helper.make_node("Cast", [name], [float32], to=TensorProto.FLOAT))
        for end in ENDS:
            body.node.append(helper.make_node(end, [float32], [f"{name}_{end}"], keepdims=0))
        body.node.append(helper.make_node("Mul", [float32, "observed_zero"], [f"{name}_zeros"]))
        body.node.append(helper.make_node("ReduceSum", [f"{name}_zeros"], [f"{name}_{FINITE}"], keepdims=0))
        for end in (*ENDS, FINITE):
            body.output.append(helper.make_tensor_value_info(f"{name}_{end}", TensorProto.FLOAT, []))
    onnx.save(model, observed)
    return names


def open_unoptimized(graph: Path) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU as it is, with little memory, to observe its values."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # fusion would hide tensors
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
