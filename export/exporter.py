"""One component from weights to a verified ONNX artifact in its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from export import lint, trace
from export.cli import say
from export.components import CALIBRATED, QUANTIZED, Batch
from export.graphs import Graph, load
from export.manifest import Artifact, Manifest, describe_files, digest, kernels_hash, source_hash
from export.quantize import precision as quantize
from export.quantize import qdq
from export.runtimes.base import sampling_settings
from export.runtimes.onnxruntime import OrtSession
from export.verification.inputs import NOISE, VerificationInputs
from export.verification.verifier import Verifier, hopeless
from vlv.checkpoints.folder import Checkpoint

CALIBRATION = 1  # seed of the probes that ranges are measured on: other pictures than those of the check


class Exporter:
    """Exports components of one checkpoint into one folder; references are computed once for all."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        made: Path,
        probes: int,
        images: Sequence[Path],
        captions: bool,
        calibrate: Sequence[Path] = (),
    ):
        """made: a folder on the same disk to work in; probes, images, captions: what Verifier checks on; calibrate:
        photos for the ranges of activations, by default as many scenes as are checked.
        """
        self.checkpoint, self.manifest, self.made = checkpoint, manifest, made
        self.probes = VerificationInputs(checkpoint, probes, images)
        count = len(calibrate) + NOISE if calibrate else probes
        self._calibration = VerificationInputs(checkpoint, count, calibrate, CALIBRATION, self.probes.reference)
        self.verifier = Verifier(checkpoint, self.probes, captions)
        self._ranges = {}  # of activations, by component: the same whichever blocks stay exact

    def plan(self, component: str, precision: str, opset: int, profile: Batch, command: str) -> Artifact:
        """What `export` would make, as far as that is known before."""
        seen = self._calibration.digest if precision in CALIBRATED else ""
        return Artifact(
            component, "onnx", "", precision, opset, (), (), profile, source_hash(self.checkpoint, component), "",
            kernels_hash(component), builder(), {}, command, calibration=seen,
        )  # fmt: skip

    def export(self, wanted: Artifact, allow_drift: bool) -> list[str]:
        """Make, check and publish. Returns the problems for which it was refused; with `allow_drift` few are left."""
        name, start = wanted.component, time.monotonic()
        say(f"{name}: tracing in {wanted.precision} …")
        graph, traced, exact = self._trace(wanted)
        say(f"{name}: traced in {time.monotonic() - start:.0f} s; checking against float32 PyTorch …")
        choices, problems = [exact], []
        if wanted.precision in QUANTIZED:
            choices = quantize.fallbacks(quantize.costs(self.probes.reference.session(name).graph))
        for exact in choices:
            if problems:
                say(f"{name}: {problems[0]}; {len(exact)} of {len(graph.blocks)} blocks not quantized …")
            artifact = self._written(wanted, graph, traced, exact)
            if problems := lint.problems(self.made / artifact.main_file, artifact):
                return problems
            figures = self.verifier.check(artifact, OrtSession.on_cpu(artifact, self.made), self.made)
            if not (problems := figures["problems"]):
                break
        if problems and (not allow_drift or hopeless(figures)):
            remedy = "choose another --precision" + ("" if hopeless(figures) else ", or keep it with --allow-drift")
            return [*problems, f"refused, and nothing kept: {remedy}"]
        if not self.manifest.sampling and "reconstruct" in self.checkpoint.can:
            self.manifest.sampling = sampling_settings(self.checkpoint)
        self.manifest.publish(replace(artifact, verification=figures), self.made)
        say(f"{name}: {'kept although it drifts' if problems else 'verified'}, {time.monotonic() - start:.0f} s in all")
        return []

    def _trace(self, wanted: Artifact) -> tuple[Graph, trace.Traced, tuple[str, ...]]:
        """The module, its graph in the work folder (apart, if it is to be quantized), and the blocks kept exact."""
        name, precision = wanted.component, wanted.precision
        sets = self.probes.inputs(name) if precision == "mixed" else []
        reference = self.probes.reference.session(name).graph
        graph, exact = quantize.prepare(reference, lambda: load(self.checkpoint, name), precision, sets)
        folder = self.made / "plain" if precision in QUANTIZED else self.made
        folder.mkdir(exist_ok=True)
        return graph, trace.to_onnx(graph, folder / f"{name}.onnx", wanted.profile, wanted.opset), exact

    def _written(self, wanted: Artifact, graph: Graph, traced: trace.Traced, exact: tuple[str, ...]) -> Artifact:
        """The entry, without figures, of what is in the work folder; quantized graphs are made here."""
        if wanted.precision in QUANTIZED:
            name, source, seen = wanted.component, self.made / "plain", None
            if wanted.precision in CALIBRATED:
                if name not in self._ranges:
                    rows = self._calibration.single(name)
                    self._ranges[name] = quantize.ranges(source / traced.files[0], rows)
                seen = self._ranges[name]
            if wanted.precision in qdq.FORMATS:
                traced = qdq.quantized(traced, source, self.made, seen, exact, wanted.precision)
            else:
                traced = quantize.to_int8(traced, source, self.made, seen, exact)
        files = describe_files(self.made, traced.files)
        return replace(
            wanted,
            inputs=graph.inputs,
            outputs=trace.output_ports(self.made / traced.files[0]),
            files=files,
            graph=digest({file: entry["sha256"] for file, entry in files.items()}),
            blocks=traced.blocks,
            exact=exact,
        )


def builder() -> str:
    """What decides how a graph comes out, beside the source."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxscript", "onnxruntime"))
