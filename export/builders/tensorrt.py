"""Build TensorRT and TensorRT-RTX engines from a folder's ONNX artifacts, or give an engine other weights."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from export import plugins
from export.builders.onnx import Export, ExportConfig, Report, export_onnx
from export.components import OLDEST_FP8, ORT_ONLY, QUANTIZED, Batch, Port
from export.manifest import Artifact, ArtifactError, describe_files, name_of
from export.runtimes.base import RuntimeUnavailable
from export.runtimes.tensorrt import require_builder
from export.runtimes.tensorrt_library import LIBRARIES, Library, Log, device_target
from export.verification import graph_lint
from vlv.common.command import Misuse, say

TURING_PRECISIONS = ("fp16", "int8-trt")  # those that TensorRT-RTX 1.7 builds for SM 75
PLUGIN_PRECISIONS = ("fp16", "bf16", "mixed")  # those in which our kernels can be faster than TensorRT's own layers


@dataclass(frozen=True)
class EngineConfig:
    """Which engines to build."""

    target: str  # compute capability, as "sm89"
    runtime: str = "rtx"  # or "trt"
    plugins: str = "auto"  # or "on", "off"
    refittable: bool = False  # build engines whose weights can be replaced
    refit: bool = False  # replace the weights of the engine that is there

    @property
    def library(self) -> Library:
        """Return the library that builds."""
        return LIBRARIES[self.runtime]

    def require_precision(self, precision: str) -> None:
        """Raise Misuse for a precision that TensorRT, or the target, does not have."""
        if precision in ORT_ONLY:
            raise Misuse(f"--precision {precision} is for ONNX Runtime: TensorRT's is int8-trt")
        if precision == "fp8" and int(self.target[2:]) < OLDEST_FP8:
            raise Misuse(
                f"--precision fp8: {self.target} has no 8-bit floats, GPUs from sm{OLDEST_FP8} on have: "
                "choose int8-trt or fp16"
            )

    def require_buildable(self, config: ExportConfig) -> None:
        """Raise Misuse or ArtifactError if these engines cannot be built on this machine; called before any work."""
        self.require_precision(config.precision)
        library, here = self.library, device_target()
        trt = library.load()
        if self.runtime == "trt" and here != self.target:
            raise Misuse(
                f"--target {self.target}: TensorRT builds on the GPU that an engine is for, and this machine has "
                f"{here or 'none'}; --runtime rtx builds for GPUs elsewhere, --print-trtexec prints what to run there"
            )
        if self.runtime == "rtx":
            _capability(trt, self.target)
            self._require_turing(config)
            if self.refit and here != self.target:
                raise RuntimeUnavailable(
                    f"--refit loads the engine, which takes its GPU ({self.target}), and this machine has "
                    f"{here or 'none'}: build without --refit instead"
                )
            if self.refittable and not here:
                raise RuntimeUnavailable(
                    f"--refittable: {library.builder} builds such engines only on a machine with a GPU, and this one "
                    "has none: build without it"
                )

    def _require_turing(self, config: ExportConfig) -> None:
        """Raise Misuse for what TensorRT-RTX 1.7 cannot build for SM 75: float32 products, and bfloat16."""
        if self.target != "sm75":
            return
        remedy = "use --runtime trt on that GPU, or the runtime onnx-cuda"
        if config.precision not in TURING_PRECISIONS:
            raise Misuse(
                f"--target sm75 --precision {config.precision}: TensorRT-RTX builds {' and '.join(TURING_PRECISIONS)} "
                f"alone for Turing, which has no float32 products there: {remedy}"
            )
        if not config.components or "encoder" in config.components:
            raise Misuse(
                "--target sm75: TensorRT-RTX builds no encoder for Turing, because its preprocessing is in float32: "
                f"{remedy}"
            )

    def command(self, config: ExportConfig, component: str) -> str:
        """Return the command that builds this one engine again."""
        flags = ["--target", self.target, "--runtime", self.runtime, "--plugins", self.plugins]
        flags += ["--refittable"] if self.refittable or self.refit else []
        return config.command(component, "export.trt", flags)


def build_engines(export: Export, options: EngineConfig) -> Report:
    """Export what is not up to date, and build the engine of every component unless it is up to date.

    No engine is built if an export is refused; the report says why.
    """
    report = export_onnx(export)
    if not report.problems:
        for graph in report.artifacts:
            _build_engine(export, options, graph)
    return report


def wants_plugins(asked: str, runtime: str, precision: str) -> bool:
    """Decide whether an engine gets our kernels. Raises RuntimeUnavailable if they are asked for without Triton."""
    triton = importlib.util.find_spec("triton") is not None
    if runtime == "rtx" or precision in QUANTIZED:
        reason = "TensorRT-RTX has no plugins" if runtime == "rtx" else f"{precision} is made from the plain graph"
        if asked == "on":
            say(f"--plugins on: {reason}, so the engine is built from the plain graph")
        return False
    if asked == "on" and not triton:
        raise RuntimeUnavailable("--plugins on: our kernels are built by Triton, which is not here: pip install triton")
    return asked == "on" or (asked == "auto" and triton and precision in PLUGIN_PRECISIONS)


def _build_engine(export: Export, options: EngineConfig, graph: Artifact) -> None:
    """Build or refit the engine of one component, unless it is up to date."""
    manifest, work_dir, library = export.manifest, export.work_dir, options.library
    graph = manifest.checked(graph.component)
    expected = replace(
        graph,
        runtime=options.runtime,
        target=options.target,
        files={},
        verification={},
        builder=library.builder,
        command=options.command(export.config, graph.component),
        refittable=options.refittable or options.refit,  # a refitted engine can be refitted again
    )
    with_plugins = wants_plugins(options.plugins, options.runtime, graph.precision)
    if with_plugins:
        expected = replace(expected, kernels=plugins.source_hash())
    label = name_of(graph.component, options.runtime, options.target)
    if not export.config.force and manifest.current(expected):
        say(f"{label}: up to date")
        return
    source, profile = manifest.folder / graph.main_file, graph.profile
    if problems := graph_lint.problems(source, graph, options.runtime):
        raise ArtifactError(f"{label}: {'; '.join(problems)}")
    start, cache = time.monotonic(), manifest.folder / f"timing-{options.runtime}-{options.target}.cache"
    if with_plugins and (found := plugins.make(export.checkpoint, graph, work_dir, source, options.target)):
        source, kernels = found
        profile = Batch(profile.max, profile.max, profile.max)
        plugins.register(library.load(), kernels)
        say(f"{label}: {len(kernels)} kernels of ours, for batches of {profile.max}")
    file = f"{graph.component}.{options.runtime}-{options.target}.engine"
    if options.refit:
        old = manifest.find(graph.component, options.runtime, options.target)
        manifest.require_intact(old)  # not `checked`: an engine to refit is older than its graph
        (work_dir / file).write_bytes(refit(library, old, manifest.folder / old.main_file, source))
    else:
        timing = cache.read_bytes() if cache.is_file() else b""
        content, timing = build(
            library, str(source), graph.inputs, profile, options.target, timing, expected.refittable
        )
        (work_dir / file).write_bytes(content)
        if timing:
            (work_dir / cache.name).write_bytes(timing)
            (work_dir / cache.name).replace(cache)
    files = describe_files(work_dir, [file])
    manifest.publish(replace(expected, files=files), work_dir)
    done = "refitted" if options.refit else "built"
    say(f"{label}: {done} in {time.monotonic() - start:.0f} s, {files[file]['bytes'] / 1e6:.1f} MB")


def build(
    library: Library,
    graph: str,
    inputs: tuple[Port, ...],
    profile: Batch,
    target: str,
    timing: bytes = b"",
    refittable: bool = False,
) -> tuple[bytes, bytes]:
    """Build the engine of an ONNX file; return it, and the timing cache to keep (empty for TensorRT-RTX).

    target: "sm89" and so on; TensorRT builds for the GPU of this machine alone. Raises ArtifactError.
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
        shapes.set_shape(port.name, *(port.at(size) for size in (profile.min, profile.opt, profile.max)))
    config.add_optimization_profile(shapes)
    if refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if library.runtime == "rtx":
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(_capability(trt, target), 0):
            raise ArtifactError(f"{library.title} {trt.__version__} takes no target {target}")
    if library.runtime == "trt":  # TensorRT-RTX measures nothing before an engine runs, and keeps no such cache
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
            "for other GPUs use --runtime trt on a machine that has one; --print-trtexec prints what to run there"
        )
    return trt.ComputeCapability.__members__[target.upper()]


def refit(library: Library, artifact: Artifact, engine_file: Path, graph: Path) -> bytes:
    """Return a serialized engine of the same graph with the weights of `graph`; needs the GPU. Raises ArtifactError."""
    trt = library.load()
    if device_target() != artifact.target:
        raise RuntimeUnavailable(
            f"--refit loads the engine, which takes its GPU ({artifact.target}): build without it instead"
        )
    require_builder(library, artifact)
    log = Log(trt)
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None or not engine.refittable:
        raise ArtifactError(f"the weights of {engine_file} cannot be replaced: build it with --refittable")
    refitter = trt.Refitter(engine, log.logger)
    if not trt.OnnxParserRefitter(refitter, log.logger).refit_from_file(str(graph)):
        raise ArtifactError(f"{graph} is another graph than that of {engine_file} ({log.last()}): build it again")
    if not refitter.refit_cuda_engine():
        raise ArtifactError(f"{engine_file} cannot be refitted: {log.last()}")
    return bytes(engine.serialize())
