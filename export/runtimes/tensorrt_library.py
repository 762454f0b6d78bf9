"""TensorRT and TensorRT-RTX, whose Python interfaces are one from version 11 on: found, or named with their install.

`rtx` builds for GPUs that are not there and compiles its kernels when an engine is first run; `trt` builds on the GPU
that the engine is for. Both are strongly typed: the precision is the graph's.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from export.components import Batch, Port
from export.manifest import ArtifactError
from export.runtimes.base import RuntimeUnavailable


@dataclass(frozen=True)
class Library:
    """One of the two."""

    runtime: str
    modules: tuple[str, ...]  # import names, the usual one first
    title: str
    install: str

    def load(self) -> ModuleType:
        """The module. Raises RuntimeUnavailable."""
        reason = "it is not installed"
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    reason = str(error)
            except (ImportError, OSError) as error:  # bindings without their library
                reason = str(error)
        raise RuntimeUnavailable(f"{self.title} cannot be loaded ({reason}): {self.install}")

    @property
    def builder(self) -> str:
        """Name and version, as the manifest keeps them. Raises RuntimeUnavailable."""
        return f"{self.title} {self.load().__version__}"


LIBRARIES = {
    "rtx": Library(
        "rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "TensorRT-RTX",
        "python -m pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
    "trt": Library(
        "trt", ("tensorrt", "tensorrt_bindings"), "TensorRT",
        "python -m pip install --no-deps tensorrt-cu13-libs tensorrt-cu13-bindings",
    ),
}  # fmt: skip


class Log:
    """Collects what the builder says; only errors are of use, in the sentence that tells the failure."""

    def __init__(self, trt: ModuleType):
        collected = self.errors = []

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, message):
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    collected.append(message.strip())

        self.logger = Logger()

    def last(self) -> str:
        return self.errors[-1][:300] if self.errors else "it gives no reason"


def build(
    library: Library, graph: str, inputs: tuple[Port, ...], profile: Batch, target: str,
    timing: bytes = b"", refittable: bool = False,
) -> tuple[bytes, bytes]:  # fmt: skip
    """Build the engine of an ONNX file. Returns it, and the timing cache to keep (empty for TensorRT-RTX).

    target: "sm89" and so on; TensorRT proper builds for the GPU of this machine alone. Raises ArtifactError.
    """
    trt = library.load()
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(graph):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ArtifactError(f"{library.title} does not take {graph}: {'; '.join(reasons)[:500] or log.last()}")
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    for port in inputs:
        shapes.set_shape(port.name, *(port.at(size) for size in (profile.least, profile.usual, profile.most)))
    config.add_optimization_profile(shapes)
    if refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if library.runtime == "rtx":
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(_capability(trt, target), 0):
            raise ArtifactError(f"{library.title} {trt.__version__} takes no target {target}")
    if library.runtime == "trt":  # TensorRT-RTX times nothing before it runs, and keeps no such cache
        config.set_timing_cache(config.create_timing_cache(timing), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ArtifactError(f"{library.title} cannot build {graph} for {target}: {log.last()}")
    return bytes(engine), bytes(config.get_timing_cache().serialize()) if library.runtime == "trt" else b""


def _capability(trt: ModuleType, target: str):
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if target.upper() not in names:
        raise ArtifactError(
            f"TensorRT-RTX {trt.__version__} builds for {', '.join(n.lower() for n in names)}, not for {target}: "
            "for other GPUs use --runtime trt on a machine that has one"
        )
    return trt.ComputeCapability.__members__[target.upper()]


def device_target() -> str:
    """The compute capability of this machine's first GPU, as "sm90"; "" where there is none."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return "sm{}{}".format(*torch.cuda.get_device_capability(0))
