"""Find the blocks of a float16 graph whose values overflow, which ONNX Runtime on a CPU does not show.

ONNX Runtime computes float16 nodes on a CPU in float32, and removes the casts between neighbours: a value above 65,504
passes through, and becomes infinite on a GPU. So the graph runs here in float32, and every value that a GPU would keep
in float16 is observed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.quantize.calibration import open_unoptimized
from export.trace import Traced

MAX = 65504.0  # the largest float16
HEADROOM = 2.0  # other images may reach further than those that are observed


@dataclass(frozen=True)
class Range:
    """The largest magnitude of one value of a graph, and the block that computes it."""

    value: str
    block: str | None
    max: float


def float16_ranges(graph: Path, traced: Traced, rows: Iterable[dict[str, np.ndarray]]) -> list[Range]:
    """Return the range, over all `rows` of inputs, of every value that `graph` keeps in float16.

    Masks are left out: infinite values, and of scores, which only a softmax reads (also through sums), the negative
    ones, which may become infinite as long as one of their row does not: the softmax of nothing but -inf is NaN.
    A file is made beside `graph` for a while.
    """
    observed = graph.with_name(f"observed-{graph.name}")
    try:
        onnx.shape_inference.infer_shapes_path(graph, observed)
        model = onnx.load(observed, load_external_data=False)
        values = {v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
        block_of = {value: traced.owner.get(node.name) for node in model.graph.node for value in node.output}
        names = [value for value in block_of if value in values]
        _compute_in_float32(model)
        _observe_magnitudes(model, names)
        onnx.save(model, observed)
        session = open_unoptimized(observed)
        found = np.array([session.run([f"{name}_max" for name in names], row) for row in rows])
    finally:
        observed.unlink(missing_ok=True)
    if not names:
        return []
    return [Range(name, block_of[name], float(m)) for name, m in zip(names, found.max(0), strict=True)]


def overflowing(ranges: Iterable[Range], fp32_blocks: Collection[str]) -> tuple[set[str], list[Range]]:
    """Return the blocks to compute in float32 beside `fp32_blocks`, and the values that no choice of blocks can help.

    These are the values between blocks, and the outputs of blocks that are in float32 already.
    """
    blocks, others = set(), []
    for one in ranges:
        if one.block and one.block not in fp32_blocks:
            if one.max > MAX / HEADROOM:
                blocks.add(one.block)
        elif one.max > MAX:
            others.append(one)
    return blocks, others


def _compute_in_float32(model: ModelProto) -> None:
    """Replace float16 by float32 in all nodes; float16 weights are cast where they are read."""
    half = {weight.name for weight in model.graph.initializer if weight.data_type == TensorProto.FLOAT16}
    cast: set[str] = set()
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in half:
                if name not in cast:
                    nodes.append(helper.make_node("Cast", [name], [f"{name}_float32"], to=TensorProto.FLOAT))
                    cast.add(name)
                node.input[i] = f"{name}_float32"
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
        nodes.append(node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


def _scores(model: ModelProto) -> set[str]:
    """Return the values that only a softmax reads, also through sums: scores and their masks."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    scores: set[str] = set()
    for node in reversed(model.graph.node):  # readers come after what they read
        for value in node.output:
            read_by = readers.get(value, [])
            if read_by and all(
                r.op_type == "Softmax" or (r.op_type == "Add" and r.output[0] in scores) for r in read_by
            ):
                scores.add(value)
    return scores


def _observe_magnitudes(model: ModelProto, names: list[str]) -> None:
    """Add an output `<name>_max` for each value: the largest finite magnitude; of scores, that of a row's largest."""
    body = model.graph
    body.initializer.append(helper.make_tensor("observed_zero", TensorProto.FLOAT, [], [0.0]))
    body.initializer.append(helper.make_tensor("observed_row", TensorProto.INT64, [1], [-1]))
    scores = _scores(model)
    # in reverse: ONNX Runtime visits ends without successors from the last one, and frees what nothing waits for
    for name in reversed(names):
        value = name
        if name in scores:
            value = f"{name}_row"
            body.node.append(helper.make_node("ReduceMax", [name, "observed_row"], [value]))
        body.node.append(helper.make_node("IsInf", [value], [f"{name}_infinite"]))
        body.node.append(helper.make_node("Where", [f"{name}_infinite", "observed_zero", value], [f"{name}_finite"]))
        body.node.append(helper.make_node("Abs", [f"{name}_finite"], [f"{name}_magnitude"]))
        body.node.append(helper.make_node("ReduceMax", [f"{name}_magnitude"], [f"{name}_max"], keepdims=0))
        body.output.append(helper.make_tensor_value_info(f"{name}_max", TensorProto.FLOAT, []))
