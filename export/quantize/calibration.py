"""Ranges of activations for INT8 and FP8: what ONNX Runtime's own calibration finds, in a fraction of its memory.

Its calibration holds the weights several times, and every observed tensor until the end of a run: 24 GB were not
enough for the encoder of 1 B parameters. Here the weights stay in their file, and each tensor goes once it has been
seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnxruntime.quantization.calibrate import TensorsData

ENDS = ("ReduceMin", "ReduceMax")


def ranges(graph: Path, kinds: Iterable[str], rows: Iterable[dict[str, np.ndarray]]) -> TensorsData:
    """Smallest and largest value, over all `rows` of inputs, of what goes into and out of nodes of these kinds.

    graph: a float32 or float16 ONNX file; a file is made beside it for a while, since both read the same weights.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    watched = graph.with_name(f"watched-{graph.name}")
    try:
        names = _watch(graph, set(kinds), watched)
        session = _open(watched)
        found = [session.run([f"{name}_{end}" for end in ENDS for name in names], row) for row in rows]
    finally:
        watched.unlink(missing_ok=True)
    low, high = np.split(np.array(found), 2, axis=1)
    low, high = low.min(0)[:, None], high.max(0)[:, None]  # [tensors, 1], the shape that quantize_static expects
    seen = {name: (low[i], high[i]) for i, name in enumerate(names)}
    return TensorsData(CalibrationMethod.MinMax, seen)


def _watch(graph: Path, kinds: set[str], watched: Path) -> list[str]:
    """Write the graph with each tensor's ends as outputs; returns the tensors in the order of their making."""
    import onnx
    from onnx import TensorProto, helper

    onnx.shape_inference.infer_shapes_path(graph, watched)
    model = onnx.load(watched, load_external_data=False)
    body = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*body.input, *body.value_info, *body.output)}
    weights = {w.name for w in body.initializer}
    typed = {n for n, k in types.items() if k in (TensorProto.FLOAT, TensorProto.FLOAT16)} - weights
    at_work = [node for node in body.node if node.op_type in kinds]
    names = list(dict.fromkeys(name for node in at_work for name in (*node.input, *node.output) if name in typed))
    # the last ones first: ONNX Runtime goes through ends without successor from behind, and frees what none waits for
    for name in reversed(names):
        wide = name
        if types[name] == TensorProto.FLOAT16:
            wide = f"{name}_wide"
            body.node.append(helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT))
        for end in ENDS:
            body.node.append(helper.make_node(end, [wide], [f"{name}_{end}"], keepdims=0))
            body.output.append(helper.make_tensor_value_info(f"{name}_{end}", TensorProto.FLOAT, []))
    onnx.save(model, watched)
    return names


def _open(graph: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would fuse what is seen
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
