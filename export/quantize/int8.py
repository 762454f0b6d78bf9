"""Quantize float32 graphs to INT8 with ONNX Runtime: dynamically, or with calibrated ranges of activations."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
from onnx import ModelProto
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
from torch import Tensor

from export.quantize import calibration
from export.trace import Traced, is_large

KINDS = ("MatMul", "Gemm", "Conv")  # the operators that `int8-static` quantizes


def ranges(graph: Path, sets: list[dict[str, Tensor]]) -> TensorsData:
    """Measure ranges of activations on these inputs of a graph that is not quantized."""
    return calibration.ranges(graph, KINDS, ({k: v.numpy() for k, v in inputs.items()} for inputs in sets))


def to_int8(
    traced: Traced,
    source: Path,
    work_dir: Path,
    calibration_ranges: TensorsData | None = None,
    excluded_blocks: tuple[str, ...] = (),
) -> Traced:
    """Quantize the float32 graph of the folder `source` into `work_dir`, except for `excluded_blocks`.

    calibration_ranges: of activations, for `int8-static`; None quantizes activations at run time.
    """
    graph, target = source / traced.files[0], work_dir / f"int8-{traced.files[0]}"
    large = len(traced.files) > 1
    # its advice to preprocess the graph: the trace is folded already
    logging.getLogger().addFilter(lambda record: "pre-processing before quantization" not in record.getMessage())
    # 7 bits of weights: AVX2 adds pairs of 8-bit products in 16 bits, which saturate at full range
    excluded = [node for node, path in traced.owner.items() if path is None or path in excluded_blocks]
    excluded += [f"{node}_MatMul" for node in excluded]  # ONNX Runtime's name of the product of a Gemm, which it splits
    options = {"per_channel": True, "reduce_range": True, "nodes_to_exclude": excluded}
    options |= {"weight_type": QuantType.QInt8, "use_external_data_format": large}
    if calibration_ranges is None:
        quantize_dynamic(
            graph, target, op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True}, **options
        )
    else:
        cache = work_dir / "int8-ranges.json"
        save_tensors_data(calibration_ranges, cache)
        options["nodes_to_exclude"] += _activation_products(graph)
        quantize_static(
            graph,
            target,
            None,
            QuantFormat.QDQ,
            op_types_to_quantize=[*KINDS],
            activation_type=QuantType.QUInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            calibration_cache_path=cache,
            **options,
        )
    model = onnx.load(target)
    for file in work_dir.glob("int8-*"):
        file.unlink()
    return save_quantized(model, work_dir, traced)


def _activation_products(graph: Path) -> list[str]:
    """Return the names of products of two activations; `MatMulConstBOnly` excludes them in the dynamic case alone."""
    body = onnx.load(graph, load_external_data=False).graph
    weights = {constant.name for constant in body.initializer}
    return [node.name for node in body.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]


def save_quantized(model: ModelProto, work_dir: Path, traced: Traced) -> Traced:
    """Write a quantized graph under the name of its trace, large weights in a file beside it."""
    name = traced.files[0]
    large = is_large(len(constant.raw_data) for constant in model.graph.initializer)
    (work_dir / f"{name}.data").unlink(missing_ok=True)  # of an earlier attempt: onnx would append to it
    external = {"save_as_external_data": True, "location": f"{name}.data"} if large else {}
    onnx.save(model, work_dir / name, **external)
    return Traced([name, *([f"{name}.data"] if large else [])], traced.blocks, traced.owner)
