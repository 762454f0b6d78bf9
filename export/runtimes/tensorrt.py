"""Engines of TensorRT and TensorRT-RTX on the GPU that they were built for.

Target and builder version are compared with the device and the library before an engine is deserialized.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from export.manifest import Artifact, ArtifactError
from export.runtimes.base import ArtifactRuntime, RuntimeUnavailable, Session
from export.runtimes.tensorrt_library import LIBRARIES, Library, Log, device_target


class TrtSession(Session):
    """An engine and its execution context; runs on torch's current stream, on tensors of torch's."""

    def __init__(self, library: Library, artifact: Artifact, file: Path, device: torch.device):
        super().__init__(artifact.name, artifact.inputs, artifact.profile, device)
        self.outputs = artifact.outputs
        trt = library.load()
        self._log = Log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{file} cannot be loaded ({self._log.last()}); make it again: {artifact.command}")
        self._context = self._engine.create_execution_context()
        batched = next(port.name for port in self.inputs if port.batched)
        self._only = self._engine.get_tensor_shape(batched)[0]  # the one batch that it takes, with plugins; -1 for any

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        size = batch if self._only < 0 else self._only
        if size > batch:
            ports = {port.name: port for port in self.inputs}
            values = {k: _padded(v, size) if ports[k].batched else v for k, v in values.items()}
        found = {
            port.name: torch.empty(port.at(size), dtype=getattr(torch, port.dtype), device=self.device)
            for port in self.outputs
        }
        for name, value in values.items():
            self._context.set_input_shape(name, tuple(value.shape))
        for name, value in {**values, **found}.items():
            self._context.set_tensor_address(name, value.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError(f"{self.name} failed: {self._log.last()}")
        return {name: value[:batch] for name, value in found.items()}


def _padded(x: Tensor, size: int) -> Tensor:
    """x with its last row repeated to `size` rows."""
    return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])


class RtxRuntime(ArtifactRuntime):
    """TensorRT-RTX."""

    word = runtime = "rtx"

    def __init__(self, artifacts, checkpoint=None):
        self.library = LIBRARIES[self.runtime]
        self.library.load()
        self.target = device_target()
        if not self.target:
            raise RuntimeUnavailable(
                f"the runtime {self.word} needs a CUDA device, and there is none: use onnx or torch"
            )
        self.device = torch.device("cuda", 0)
        super().__init__(artifacts, checkpoint)

    def _open(self, component: str) -> Session:
        artifact = self.checked(component)
        _require_builder(self.library, artifact)
        return TrtSession(self.library, artifact, self.manifest.folder / artifact.main_file, self.device)


class TrtRuntime(RtxRuntime):
    """TensorRT."""

    word = runtime = "trt"


def _require_builder(library: Library, artifact: Artifact) -> None:
    if artifact.builder != library.builder:
        raise ArtifactError(
            f"{artifact.name} was built by {artifact.builder}, and this is {library.builder}; "
            f"make it again: {artifact.command}"
        )


def refit(library: Library, artifact: Artifact, engine_file: Path, graph: Path) -> bytes:
    """An engine of the same graph with the weights of `graph`, serialized. Raises ArtifactError; needs the GPU."""
    trt = library.load()
    if device_target() != artifact.target:
        raise RuntimeUnavailable(
            f"--refit loads the engine, which takes its GPU ({artifact.target}): build without it instead"
        )
    _require_builder(library, artifact)
    log = Log(trt)
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None or not engine.refittable:
        raise ArtifactError(f"{engine_file} takes no other weights: build it with --refittable")
    refitter = trt.Refitter(engine, log.logger)
    if not trt.OnnxParserRefitter(refitter, log.logger).refit_from_file(str(graph)):
        raise ArtifactError(f"{graph} is another graph than that of {engine_file} ({log.last()}): build it again")
    if not refitter.refit_cuda_engine():
        raise ArtifactError(f"{engine_file} cannot be refitted: {log.last()}")
    return bytes(engine.serialize())


ENGINES = {engine.word: engine for engine in (RtxRuntime, TrtRuntime)}
