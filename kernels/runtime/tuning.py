"""Choose the block sizes and warps of each kernel: measured on this GPU, or the default of its architecture.

kernels/tuned.json holds one entry per architecture ("sm90", from `python -m kernels.occupancy`, labelled
untested) and one per GPU by name ("NVIDIA H200", written by `python -m benchmarks.gpu.kernels --tune`). A node
reads it and never tunes by itself. Under "reference" an entry lists the operations and classes of shapes ("*": all) for
which plain PyTorch measured faster, "eager" or "compiled".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kernels.runtime.dispatch import AOT_FOLDER

CUDA_DESIGN = 4
FILE = Path(__file__).parents[1] / "tuned.json"


def _choices(names: str, *rows: tuple[int, ...]) -> list[dict[str, int]]:
    """Return configurations: the values of the named constants, then num_warps and num_stages."""
    return [dict(zip([*names.split(), "num_warps", "num_stages"], row, strict=True)) for row in rows]


# The configurations that tuning chooses from; the first is the default.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    # DESIGN: see kernels/triton/window_attention.py; CUDA_DESIGN, with GROUP blocks a multiprocessor, is
    # kernels/cuda/window_attention.cu or, for tensors that it does not take, design 0
    "window_attention.forward": _choices(
        "DESIGN GROUP BLOCK_Q",
        (0, 1, 64, 4, 1),
        (0, 1, 64, 8, 1),
        (0, 1, 32, 4, 1),
        (0, 1, 128, 8, 1),
        (1, 1, 16, 1, 1),
        (1, 4, 16, 4, 1),
        (1, 2, 16, 2, 1),
        (2, 4, 64, 4, 1),
        (3, 1, 64, 4, 1),
        (3, 1, 128, 8, 1),
        *((CUDA_DESIGN, blocks, 64, 4, 1) for blocks in (2, 3)),
    ),
    "window_attention.backward": _choices("BLOCK_Q", (32, 8, 1), (16, 8, 1), (16, 4, 1)),
    **dict.fromkeys(
        ("channel_attention.gram", "channel_attention.apply"),
        _choices("BLOCK_N", (128, 4, 3), (64, 4, 3), (256, 4, 2), (256, 8, 2)),
    ),
    "channel_attention.backward": _choices("BLOCK_N", (64, 4, 2), (128, 4, 2), (128, 8, 2)),
    # DESIGN: see kernels/triton/dwconv_norm.py
    "dwconv_norm.forward": _choices(
        "DESIGN TILE LINES",
        (0, 4, 1, 4, 1),
        (0, 2, 1, 4, 1),
        (0, 8, 1, 8, 1),
        (0, 4, 1, 8, 1),
        (0, 16, 1, 8, 1),
        *((design, tile, 24, warps, 1) for tile in (1, 2) for design in (1, 2) for warps in (1, 2, 4, 8, 16)),
        *((design, 4, 48, warps, 1) for design in (1, 2) for warps in (4, 8)),
    ),
    "dwconv_norm.norm_backward": _choices("TILE", (4, 4, 1), (2, 4, 1), (4, 8, 1)),
    "dwconv_norm.weight_backward": _choices("TILE", (16, 4, 1), (8, 4, 1), (32, 8, 1)),
    # TMA 1: keys and values through tensor descriptors, which Hopper and later GPUs copy asynchronously
    "attention.forward": _choices(
        "BLOCK_M BLOCK_N TMA",
        (64, 64, 0, 4, 3),
        (128, 64, 0, 8, 3),
        (64, 32, 0, 4, 3),
        (64, 32, 0, 8, 2),
        (128, 64, 1, 8, 3),
        (64, 64, 1, 4, 3),
        (128, 128, 1, 8, 2),
    ),
    "attention.delta": _choices("BLOCK_M", (64, 4, 1)),
    "attention.backward": _choices("BLOCK_OUT BLOCK_IN", (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2)),
    "cross_attention.forward": _choices("BLOCK_M", (64, 4, 1), (128, 8, 1), (32, 4, 1)),
    "add_norm.forward": _choices("ROWS", (1, 4, 1), (1, 2, 1), (2, 4, 1), (4, 4, 1)),
    "fp8_linear.quantize": _choices("ROWS", (1, 4, 1), (1, 8, 1), (2, 4, 1), (4, 4, 1), (4, 8, 1)),
    # EPILOGUE 1: GELU in the epilogue of the matrix product (kernels/linear.py); no kernel of ours
    "linear.gelu": _choices("EPILOGUE", (0, 1, 1), (1, 1, 1)),
    "upsample_normalize.forward": _choices("BLOCK", (256, 4, 1), (128, 4, 1), (512, 8, 1)),
}

ALIKE = {"sm100": "sm90", "sm103": "sm90", "sm121": "sm120"}  # the entry of an architecture that has none of its own
_fitting: dict[tuple[str, str, torch.device], int] = {}  # index into _by_size of a kernel that did not fit
_forced: list[tuple[str | None, dict[str, dict[str, int]]]] = []


@cache
def table() -> dict:
    """Return the content of tuned.json."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


@cache
def _names(index: int) -> tuple[str, str]:
    """Return (name of the GPU, name of its architecture)."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"sm{major}{minor}"


def config(kernel: str, shape: str, device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    """Return (constants, options) of `kernel` for a class of shapes such as "d32" on that device."""
    target, overrides = _forced[-1] if _forced else (None, {})
    if kernel in overrides:
        return split(overrides[kernel])
    if (kernel, shape, device) in _fitting:
        return split(_by_size(kernel)[_fitting[kernel, shape, device]])
    names = (target,) if target else _names(device.index or 0) if device.type == "cuda" else ()
    if AOT_FOLDER and not target:
        names = names[1:]  # builds are made from the entry of an architecture
    for entry in (*names, *(ALIKE[name] for name in names if name in ALIKE)):
        shapes = table().get(entry, {}).get("kernels", {}).get(kernel, {})
        if shape in shapes:
            return split(shapes[shape]["config"])
    return split(CANDIDATES[kernel][0])


def split(values: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the (constants, options) of a configuration."""
    options = {name: values[name] for name in ("num_warps", "num_stages")}
    return {name: value for name, value in values.items() if name not in options}, options


def tuned_constant(kernel: str, shape: str, name: str, index: int) -> int:
    """Return one constant of the configuration of `kernel` on a GPU; a constant of a traced graph."""
    return config(kernel, shape, torch.device("cuda", index))[0][name]


tuned_constant._dynamo_marked_constant = True


def _fits_registers(config: dict[str, int], channels: int) -> bool:
    values = config["TILE"] * channels / (32 * config["num_warps"])  # of a line in a thread
    if not config["DESIGN"]:
        return values <= (16 if config["TILE"] == 16 else 32)
    return 4 <= values <= (8 if config["TILE"] == 4 else 16) and channels <= 256 * config["num_warps"]


def candidates(kernel: str, shape: str) -> list[dict[str, int]]:
    """Return the configurations worth measuring for a class of shapes.

    A thread of a dwconv_norm walk holds at least 4 values of a line, or its loads are narrow, and the nine weights of
    at most 8 channels, or they do not fit. With more values in a thread than _fits_registers allows, sm90 spills.
    """
    found = CANDIDATES[kernel]
    if kernel == "window_attention.forward" and shape != "w12d32":
        found = [one for one in found if one["DESIGN"] != CUDA_DESIGN]
    if kernel == "dwconv_norm.forward":
        channels = int(shape.removeprefix("c"))
        found = [one for one in found if _fits_registers(one, channels)]
    return found


def _by_size(kernel: str) -> list[dict[str, int]]:
    """Return the candidates by falling need of shared memory (blocks times stages), then one stage of blocks of 16."""
    options = {"num_warps": 4, "num_stages": 1}
    smallest = {name: options.get(name, min(value, 16)) for name, value in CANDIDATES[kernel][0].items()}
    needs = lambda one: prod(value for name, value in one.items() if name not in ("num_warps", "TMA", "DESIGN"))  # noqa: E731
    tiles = [one for one in CANDIDATES[kernel] if one.get("DESIGN") != CUDA_DESIGN]
    return [*sorted(tiles, key=needs, reverse=True), smallest]


def next_smaller(kernel: str, shape: str, device: torch.device) -> tuple[dict[str, int], dict[str, int]] | None:
    """Return the next smaller configuration and use it for these shapes from now on; None after the smallest."""
    at = _fitting.get((kernel, shape, device), -1) + 1
    if at == len(_by_size(kernel)):
        return None
    _fitting[kernel, shape, device] = at
    return split(_by_size(kernel)[at])


def reference_is_faster(op: str, shape: str, x: Tensor) -> bool:
    """Return True if PyTorch measured faster than the kernel of `op` for this class of shapes, on x's GPU.

    Eager and compiled PyTorch have lists of their own. A GPU that was never measured follows its architecture's entry.
    While a graph with nodes is exported, a runtime's plugins decide instead.
    """
    if x.device.type != "cuda" or torch.jit.is_tracing():
        return False
    return _listed(op, shape, x.device.index or 0, torch.compiler.is_compiling())


def _listed(op: str, shape: str, index: int, compiled: bool) -> bool:
    if torch.compiler.is_exporting():
        return False
    name, architecture = _names(index)
    entries = [table().get(entry, {}) for entry in (name, architecture, ALIKE.get(architecture))]
    lists = next((entry["reference"] for entry in entries if "reference" in entry), {})
    shapes = lists.get("compiled" if compiled else "eager", {}).get(op, [])
    return shape in shapes or "*" in shapes


# what torch.compiler.assume_constant_result sets, without the second that importing its compiler takes
_listed._dynamo_marked_constant = True


@contextmanager
def forced(target: str | None = None, **kernels: dict[str, int]) -> Iterator[None]:
    """Use the defaults of architecture `target`, and for kernels given by name ("a.b" as a__b) the given config."""
    _forced.append((target, {name.replace("__", "."): values for name, values in kernels.items()}))
    try:
        yield
    finally:
        _forced.pop()
