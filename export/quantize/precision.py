"""Precisions: what the inside of a graph computes in, and which of its blocks have to stay exact.

| precision     | made by                                                                                       |
|---------------|-----------------------------------------------------------------------------------------------|
| `fp32`        | the trace as it is                                                                            |
| `fp16` `bf16` | the module cast before tracing, so that the graph is strongly typed                           |
| `mixed`       | fp16, but for the blocks whose own error is the largest, as few as keep the tolerance         |
| `int8`        | ONNX Runtime: weights by channel ahead, activations by tensor at run time                     |
| `int8-static` | ONNX Runtime: activation ranges calibrated on pictures                                        |
| `int8-trt`    | a float16 graph with calibrated Q/DQ nodes for TensorRT (export/quantize/qdq.py); so `fp8`, from SM
89 |

INT8 touches the products with weights inside blocks alone: the preprocessing's are exact by design, attention's cost
little and lose much. Most of what 8 bits lose is lost in small blocks near the output, so the cheapest blocks stay in
float32 (in TensorRT's precisions: float16); where it still drifts, more of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from export.components import PEAK, tolerance
from export.graphs import Graph
from export.quantize import calibration as calibrate
from export.trace import Traced, is_large
from export.verification.layer_drift import reference_outputs

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime.quantization.calibrate import TensorsData

KINDS = ("MatMul", "Gemm", "Conv")  # what `int8-static` quantizes
FREE = 0.03  # of a graph's `costs`: blocks up to that stay in float32, whatever INT8 loses
MOST = 0.5  # of them; a graph with more in float32 is no INT8
DTYPES = {"bf16": torch.bfloat16} | dict.fromkeys(("fp16", "mixed", "int8-trt", "fp8"), torch.float16)


class NotPossible(ValueError):
    """No choice of blocks keeps the tolerance."""


def prepare(
    exact: Graph, load: Callable[[], Graph], precision: str, sets: list[dict[str, Tensor]]
) -> tuple[Graph, tuple[str, ...]]:
    """The module to trace for a precision, and the blocks that stay in float32.

    exact: the float32 module, which is also what INT8 starts from; load: makes another one, to be cast; sets: probes
    by input name, for `mixed`.
    """
    if precision == "mixed":
        return _mixed(load, exact, sets)
    dtype = DTYPES.get(precision)
    return (load().cast(dtype) if dtype else exact), ()


@torch.inference_mode()
def _mixed(load: Callable[[], Graph], exact: Graph, sets: list[dict[str, Tensor]]) -> tuple[Graph, tuple[str, ...]]:
    """Blocks in order of their own error in fp16; 0, 1, 2, 4 … of them stay exact, until the outputs are."""
    expected = [_outputs(exact, inputs) for inputs in sets]
    ranking = sorted(own_errors(exact, load(), sets[0]).items(), key=lambda item: -item[1])
    allowed = tolerance("mixed", len(exact.blocks), exact.longest)
    count = 0
    while True:
        kept = tuple(path for path, _ in ranking[:count])
        graph = load().cast(torch.float16, kept)
        errors = [_error(f, e) for inputs, want in zip(sets, expected, strict=True)
                  for f, e in zip(_outputs(graph, inputs), want, strict=True)]  # fmt: skip
        if all(rms <= allowed and peak <= PEAK * allowed for rms, peak in errors):
            return graph, kept
        if count >= len(ranking):
            raise NotPossible("mixed: what is between the blocks overflows in fp16: use fp32 or bf16")
        count = min(max(1, 2 * count), len(ranking))


def own_errors(exact: Graph, graph: Graph, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Each block's RMS error in fp16 on float32 inputs, relative to its output's RMS; inf where it overflows."""
    arguments: dict[str, tuple] = {}
    hooks = [
        exact.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: arguments.setdefault(path, (args, kwargs)) and None, with_kwargs=True
        )
        for path in exact.blocks
    ]
    expected = reference_outputs(exact, exact.blocks, inputs)
    for hook in hooks:
        hook.remove()
    graph.cast(torch.float16)
    errors = {}
    for path in exact.blocks:
        args, kwargs = arguments[path]
        found = graph.get_submodule(path)(*_half(args), **{k: _half(v) for k, v in kwargs.items()})
        rms, _ = _error(found if isinstance(found, Tensor) else found[0], expected[path])
        errors[path] = rms if np.isfinite(rms) else float("inf")
    return errors


def _half(value):
    if isinstance(value, Tensor):
        return value.half() if value.is_floating_point() else value
    return type(value)(map(_half, value)) if isinstance(value, tuple | list) else value


def _outputs(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = graph(*(inputs[port.name] for port in graph.inputs))
    return (found,) if isinstance(found, Tensor) else found


def _error(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """RMS over RMS, and the largest over the largest."""
    difference, expected = found.double() - expected.double(), expected.double()
    rms = difference.square().mean().sqrt() / expected.square().mean().sqrt()
    return rms.item(), (difference.abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def costs(graph: Graph) -> dict[str, float]:
    """What each block costs in float32, the cheapest first: its share of the weights of linear layers and convolutions,
    or of the products with them that one row takes, whichever is larger.
    """
    layers = {path: module for path, module in graph.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    weights = {path: module.weight.numel() for path, module in layers.items()}
    products = dict.fromkeys(layers, 0)

    def count(path: str):
        def hook(module, args, output):
            products[path] += output.numel() * module.weight[0].numel()

        return hook

    hooks = [module.register_forward_hook(count(path)) for path, module in layers.items()]
    graph(*graph.example(1))
    for hook in hooks:
        hook.remove()
    shares = {
        block: max(sum(n for path, n in numbers.items() if f"{path}.".startswith(f"{block}.")) / sum(numbers.values())
                   for numbers in (weights, products))
        for block in graph.blocks
    }  # fmt: skip
    return dict(sorted(shares.items(), key=lambda item: item[1]))


def cheapest(shares: dict[str, float], allowance: float = FREE) -> tuple[str, ...]:
    """As many of the cheapest blocks as together cost no more than this; shares: from `costs`."""
    sums = itertools.accumulate(shares.values())
    return tuple(block for block, total in zip(shares, sums, strict=True) if total <= allowance)


def fallbacks(shares: dict[str, float]) -> list[tuple[str, ...]]:
    """The blocks to leave as they are, and those to try where that fails: for twice the allowance each time."""
    allowances = itertools.takewhile(lambda allowance: allowance <= MOST, (FREE * 2**i for i in itertools.count()))
    return list(dict.fromkeys(cheapest(shares, allowance) for allowance in allowances))


def ranges(graph: Path, sets: list[dict[str, Tensor]]) -> TensorsData:
    """What calibrated precisions need, measured on these inputs of a graph that is not quantized."""
    return calibrate.ranges(graph, KINDS, ({k: v.numpy() for k, v in inputs.items()} for inputs in sets))


def to_int8(
    traced: Traced, source: Path, made: Path, seen: TensorsData | None = None, exact: tuple[str, ...] = ()
) -> Traced:
    """Quantize the float32 graph of the folder `source` into the folder `made`.

    seen: ranges of activations, for `int8-static`; exact: blocks that stay in float32.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.calibrate import save_tensors_data

    graph, target = source / traced.files[0], made / f"int8-{traced.files[0]}"
    large = len(traced.files) > 1
    # its advice to preprocess: the trace is folded already
    logging.getLogger().addFilter(lambda record: "pre-processing before quantization" not in record.getMessage())
    # 7 bits of weights: AVX2 adds pairs of 8-bit products in 16 bits, which saturate at full range
    loose = [node for node, path in traced.owner.items() if path is None or path in exact]
    loose += [f"{node}_MatMul" for node in loose]  # what ONNX Runtime calls the product of a Gemm, which it splits
    options = {"per_channel": True, "reduce_range": True, "nodes_to_exclude": loose}
    options |= {"weight_type": QuantType.QInt8, "use_external_data_format": large}
    if seen is None:
        quantize_dynamic(
            graph, target, op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True}, **options
        )
    else:
        cache = made / "int8-ranges.json"
        save_tensors_data(seen, cache)
        options["nodes_to_exclude"] += _attention(graph)
        quantize_static(
            graph, target, None, QuantFormat.QDQ, op_types_to_quantize=[*KINDS], activation_type=QuantType.QUInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}, calibration_cache_path=cache,
            **options,
        )  # fmt: skip
    model = onnx.load(target)
    for file in made.glob("int8-*"):
        file.unlink()
    return saved(model, made, traced)


def _attention(graph: Path) -> list[str]:
    """The products of two activations, by their nodes' names; `MatMulConstBOnly` means only dynamic quantization."""
    import onnx

    body = onnx.load(graph, load_external_data=False).graph
    weights = {constant.name for constant in body.initializer}
    return [node.name for node in body.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]


def saved(model: ModelProto, made: Path, traced: Traced) -> Traced:
    """Write a quantized graph under the name that it was traced with, its weights beside it where they are large."""
    import onnx

    name = traced.files[0]
    large = is_large(len(constant.raw_data) for constant in model.graph.initializer)
    (made / f"{name}.data").unlink(missing_ok=True)  # of an attempt before: onnx would append to it
    external = {"save_as_external_data": True, "location": f"{name}.data"} if large else {}
    onnx.save(model, made / name, **external)
    return Traced([name, *([f"{name}.data"] if large else [])], traced.blocks, traced.owner)
