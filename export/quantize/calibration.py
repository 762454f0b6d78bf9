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

ENDS = ("ReduceMin", "ReduceMax")


def ranges(graph: Path, kinds: Iterable[str], rows: Iterable[dict[str, np.ndarray]]) -> TensorsData:
    """Return the smallest and largest value, over all `rows` of inputs, of the inputs and outputs of nodes of `kinds`.

    graph: a float32 or float16 ONNX file; a file is made beside it for a while, since both read the same weights.
    """
    observed = graph.with_name(f"observed-{graph.name}")
    try:
        names = _observe(graph, set(kinds), observed)
        session = _open(observed)
        found = [session.run([f"{name}_{end}" for end in ENDS for name in names], row) for row in rows]
    finally:
        observed.unlink(missing_ok=True)
    low, high = np.split(np.array(found), 2, axis=1)
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
    # in reverse: ONNX Runtime visits ends without successors from the last one, and frees what nothing waits for
    for name in reversed(names):
        float32 = name
        if types[name] == TensorProto.FLOAT16:
            float32 = f"{name}_float32"
            body.node.append(helper.make_node("Cast", [name], [float32], to=TensorProto.FLOAT))
        for end in ENDS:
            body.node.append(helper.make_node(end, [float32], [f"{name}_{end}"], keepdims=0))
            body.output.append(helper.make_tensor_value_info(f"{name}_{end}", TensorProto.FLOAT, []))
    onnx.save(model, observed)
    return names


def _open(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # fusion would hide tensors
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
