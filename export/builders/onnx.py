"""Export components of a checkpoint as verified ONNX artifacts."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from onnxruntime.quantization.calibrate import TensorsData

from export import trace
from export.components import CALIBRATED, COMPONENTS, QUANTIZED, Batch, opset
from export.graphs import Graph, load
from export.manifest import Artifact, Manifest, describe_files, digest, kernels_hash, source_hash, workspace
from export.quantize import int8, overflow, precision, qdq
from export.runtimes.onnxruntime import OrtSession
from export.runtimes.torch import sampling_settings
from export.verification import graph_lint
from export.verification.inputs import NOISE, VerificationInputs
from export.verification.verifier import Verifier, hopeless
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import Misuse, say

CALIBRATION_SEED = 1  # ranges are measured on other images than those of the check


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and how it is verified."""

    ckpt: str  # the checkpoint's name on the command line, for the command that rebuilds an artifact
    out: Path
    components: tuple[str, ...] = ()  # empty: all that the checkpoint has
    precision: str = "fp32"
    max_batch: int = 32  # images encoded together
    max_images: int = 8  # images reconstructed together
    verification_inputs: int = 8  # images that an artifact is verified on, two of them noise
    images: tuple[Path, ...] = ()  # photos to verify on first
    calibrate: tuple[Path, ...] = ()  # photos that ranges of activations are measured on
    captions: bool = True  # compare greedy captions too
    allow_drift: bool = False  # keep an artifact that fails the check, unless it is useless
    force: bool = False  # export again what is up to date

    def __post_init__(self):
        if self.calibrate and self.precision not in CALIBRATED:
            raise Misuse(f"--calibrate: {self.precision} has no ranges: add --precision {' or '.join(CALIBRATED)}")
        if both := set(self.calibrate) & set(self.images):
            raise Misuse(f"--calibrate {min(both)}: also among --images: calibrate on other images than are checked")

    def command(self, component: str, module: str = "export.onnx", more: Sequence[str] = ()) -> str:
        """Return the command that makes this one artifact again; more: further flags of that module."""
        words = ["python", "-m", module, "--ckpt", self.ckpt, "--out", str(self.out), "--components", component, *more]
        words += ["--precision", self.precision, "--max-batch", str(self.max_batch)]
        words += ["--max-images", str(self.max_images), "--probes", str(self.verification_inputs)]
        words += ["--images", *map(str, self.images)] if self.images else []
        words += ["--calibrate", *map(str, self.calibrate)] if self.calibrate else []
        words += ["--allow-drift"] if self.allow_drift else []
        return shlex.join([*words, *([] if self.captions else ["--no-captions"])])


@dataclass(frozen=True)
class Export:
    """An export under way: its folder is locked, its manifest open, its checkpoint resolved."""

    config: ExportConfig
    checkpoint: Checkpoint
    manifest: Manifest
    work_dir: Path

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components to export. Raises Misuse for one that the checkpoint lacks."""
        return components_of(self.config, self.checkpoint)


@dataclass(frozen=True)
class Report:
    """The ONNX artifacts of an export's components, and why any was refused."""

    artifacts: list[Artifact]
    problems: list[str]


def components_of(config: ExportConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the components to export. Raises Misuse for one that the checkpoint lacks."""
    has_t2i = "reconstruct" in checkpoint.can
    available = [c.name for c in COMPONENTS.values() if c.needs == "encoder" or has_t2i]
    for name in config.components:
        if name not in available:
            raise Misuse(f"--components {name}: {checkpoint.folder} has no t2i/, only its encoder can be exported")
    return config.components or tuple(available)


@contextmanager
def open_export(config: ExportConfig, checkpoint: Checkpoint) -> Iterator[Export]:
    """Lock the folder, and open its manifest. Raises ArtifactError, Misuse."""
    with workspace(config.out) as work_dir:
        yield Export(config, checkpoint, Manifest.open_or_new(config.out), work_dir)


def export_onnx(export: Export) -> Report:
    """Export every component that is not up to date."""
    config, manifest, problems = export.config, export.manifest, []
    exporter = Exporter(export)
    for name in export.components:
        expected = exporter.expected_artifact(name)
        current = None if config.force else manifest.current(expected)
        if current and exporter.is_verified(current):
            say(f"{name}: up to date")
            continue
        problems += [f"{name}: {problem}" for problem in exporter.export(expected)]
    artifacts = [manifest.artifacts[name] for name in export.components if name in manifest.artifacts]
    return Report(artifacts, problems)


class Exporter:
    """Export components of one checkpoint into one folder; references are computed once for all."""

    def __init__(self, export: Export):
        config = export.config
        self.config = config
        self.checkpoint = export.checkpoint
        self.manifest = export.manifest
        self.work_dir = export.work_dir
        self.inputs = VerificationInputs(self.checkpoint, config.verification_inputs, config.images)
        count = len(config.calibrate) + NOISE if config.calibrate else config.verification_inputs
        self._calibration = VerificationInputs(
            self.checkpoint, count, config.calibrate, CALIBRATION_SEED, self.inputs.reference
        )
        self.verifier = Verifier(self.checkpoint, self.inputs, config.captions)
        self._ranges: dict[str, TensorsData] = {}  # by component: the same whichever blocks are excluded

    def expected_artifact(self, component: str) -> Artifact:
        """Return what `export` would make, as far as that is known before."""
        config = self.config
        return Artifact(
            component=component,
            runtime="onnx",
            target="",
            precision=config.precision,
            opset=opset(config.precision),
            inputs=(),
            outputs=(),
            profile=COMPONENTS[component].profile(Batch.up_to(config.max_batch), Batch.up_to(config.max_images, 2)),
            source=source_hash(self.checkpoint, component),
            graph="",
            kernels=kernels_hash(component),
            builder=builder(),
            files={},
            command=config.command(component),
            calibration=self._calibration.digest if config.precision in CALIBRATED else "",
        )

    def is_verified(self, artifact: Artifact) -> bool:
        """Return True if an artifact passed the checks that are asked for, or may drift."""
        figures = artifact.verification
        asked = self.config.captions and artifact.component == "encoder" and "caption" in self.checkpoint.can
        return self.config.allow_drift or not (figures.get("problems") or (asked and not figures.get("captions")))

    def export(self, expected: Artifact) -> list[str]:
        """Make, verify and publish an artifact; return the problems for which it was refused."""
        name, start = expected.component, time.monotonic()
        self.verifier.references(name)
        say(f"{name}: tracing in {expected.precision} …")
        try:
            graph, traced, fp32_blocks = self._trace(expected)
        except precision.NotPossible as error:
            return [str(error)]
        say(f"{name}: traced in {time.monotonic() - start:.0f} s; checking against float32 PyTorch …")
        expected = replace(expected, fp32_blocks=fp32_blocks)
        candidates, problems = [()], []
        if expected.precision in QUANTIZED:
            costs = precision.block_costs(self.inputs.reference.session(name).graph)
            candidates = precision.exclusion_candidates(costs)
        for excluded_blocks in candidates:
            if problems:
                say(f"{name}: {problems[0]}; {len(excluded_blocks)} of {len(graph.blocks)} blocks not quantized …")
            artifact = self._write(replace(expected, excluded_blocks=excluded_blocks), graph, traced)
            if problems := graph_lint.problems(self.work_dir / artifact.main_file, artifact):
                return problems
            figures = self.verifier.check(artifact, OrtSession.on_cpu(artifact, self.work_dir), self.work_dir)
            if not (problems := figures["problems"]):
                break
        if problems and (not self.config.allow_drift or hopeless(figures)):
            remedy = "choose another --precision" + ("" if hopeless(figures) else ", or keep it with --allow-drift")
            return [*problems, f"refused, and nothing kept: {remedy}"]
        if not self.manifest.sampling and "reconstruct" in self.checkpoint.can:
            self.manifest.sampling = sampling_settings(self.checkpoint)
        self.manifest.publish(replace(artifact, verification=figures), self.work_dir)
        say(f"{name}: {'kept although it drifts' if problems else 'verified'}, {time.monotonic() - start:.0f} s in all")
        return []

    def _trace(self, expected: Artifact) -> tuple[Graph, trace.Traced, tuple[str, ...]]:
        """Trace the module into the work folder (to quantize it, into a folder in there); return its float32 blocks.

        Blocks whose values overflow in float16 are traced again in float32. Raises NotPossible.
        """
        name, kind = expected.component, expected.precision
        sets = self.inputs.inputs(name) if kind == "mixed" else []
        reference = self.inputs.reference.session(name).graph
        graph, fp32_blocks = precision.prepare(reference, lambda: load(self.checkpoint, name), kind, sets)
        if fp32_blocks and kind != "mixed":
            say(f"{name}: in float32, because weights overflow in float16: {', '.join(fp32_blocks)}")
        folder = self.work_dir / "plain" if kind in QUANTIZED else self.work_dir
        folder.mkdir(exist_ok=True)
        while True:
            traced = trace.to_onnx(graph, folder / f"{name}.onnx", expected.profile, expected.opset)
            if precision.DTYPES.get(kind) != torch.float16:
                return graph, traced, fp32_blocks
            more = self._overflowing(folder / traced.files[0], traced, kind, name, fp32_blocks)
            if not more:
                return graph, traced, fp32_blocks
            fp32_blocks += more
            say(f"{name}: in float32, because values overflow in float16: {', '.join(more)}")
            graph = load(self.checkpoint, name).cast(torch.float16, fp32_blocks)

    def _overflowing(
        self, file: Path, traced: trace.Traced, kind: str, name: str, fp32_blocks: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Return the blocks to compute in float32 beside `fp32_blocks`. Raises NotPossible."""
        rows = ({key: value.numpy() for key, value in row.items()} for row in self.inputs.single(name))
        ranges = overflow.float16_ranges(file, traced, rows)
        blocks, others = overflow.overflowing(ranges, fp32_blocks)
        if others:
            largest = max(others, key=lambda one: one.max)
            where = f"the output of {largest.block}" if largest.block else "a value between the blocks"
            raise precision.NotPossible(
                f"{kind}: {where} ({largest.value}) reaches {largest.max:,.0f}, and float16 ends at "
                f"{overflow.MAX:,.0f}: use --precision bf16 or fp32"
            )
        return tuple(block for block in traced.blocks if block in blocks)

    def _write(self, expected: Artifact, graph: Graph, traced: trace.Traced) -> Artifact:
        """Return the entry, without figures, of the files in the work folder; quantize them here."""
        name, plain, ranges = expected.component, self.work_dir / "plain", None
        if expected.precision in CALIBRATED:
            if name not in self._ranges:
                self._ranges[name] = int8.ranges(plain / traced.files[0], self._calibration.single(name))
            ranges = self._ranges[name]
        excluded = expected.excluded_blocks
        if expected.precision in qdq.FORMATS:
            excluded += expected.fp32_blocks
            traced = qdq.quantized(traced, plain, self.work_dir, ranges, excluded, expected.precision)
        elif expected.precision in QUANTIZED:
            traced = int8.to_int8(traced, plain, self.work_dir, ranges, excluded)
        files = describe_files(self.work_dir, traced.files)
        return replace(
            expected,
            inputs=graph.inputs,
            outputs=trace.output_ports(self.work_dir / traced.files[0]),
            files=files,
            graph=digest({file: entry["sha256"] for file, entry in files.items()}),
            blocks=traced.blocks,
        )


def builder() -> str:
    """Return the software, beside our own, that decides how a graph comes out."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxscript", "onnxruntime"))
