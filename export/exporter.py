"""One component from weights to a verified ONNX artifact in its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from export import lint, quantize, trace
from export.cli import say
from export.components import Batch
from export.engine import sampling_settings
from export.engine_ort import OrtSession
from export.graphs import load
from export.manifest import Artifact, Manifest, describe_files, digest, kernels_hash, source_hash
from export.probes import Probes
from export.verifier import Verifier, hopeless
from vlv.checkpoint import Checkpoint

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
    ):
        """made: a folder on the same disk to work in; probes, images, captions: what Verifier checks on."""
        self.checkpoint, self.manifest, self.made = checkpoint, manifest, made
        self._count = probes
        self.probes = Probes(checkpoint, probes, images)
        self.verifier = Verifier(checkpoint, self.probes, captions)

    def plan(self, component: str, precision: str, opset: int, profile: Batch, command: str) -> Artifact:
        """What `export` would make, as far as that is known before."""
        return Artifact(
            component, "onnx", "", precision, opset, (), (), profile, source_hash(self.checkpoint, component), "",
            kernels_hash(component), builder(), {}, command,
        )  # fmt: skip

    def export(self, wanted: Artifact, allow_drift: bool) -> list[str]:
        """Make, check and publish. Returns the problems for which it was refused; with `allow_drift` few are left."""
        name, start = wanted.component, time.monotonic()
        say(f"{name}: tracing in {wanted.precision} …")
        artifact = self._trace(wanted)
        if problems := lint.problems(self.made / artifact.main_file, artifact):
            return problems
        say(f"{name}: traced in {time.monotonic() - start:.0f} s; checking against float32 PyTorch …")
        session = OrtSession.on_cpu(artifact, self.made)
        figures = self.verifier.check(artifact, session, self.made)
        problems = figures["problems"]
        if problems and (not allow_drift or hopeless(figures)):
            remedy = "choose another --precision" + ("" if hopeless(figures) else ", or keep it with --allow-drift")
            return [*problems, f"refused, and nothing kept: {remedy}"]
        if not self.manifest.sampling and "reconstruct" in self.checkpoint.can:
            self.manifest.sampling = sampling_settings(self.checkpoint)
        self.manifest.publish(replace(artifact, verification=figures), self.made)
        say(f"{name}: {'kept although it drifts' if problems else 'verified'}, {time.monotonic() - start:.0f} s in all")
        return []

    def _trace(self, wanted: Artifact) -> Artifact:
        """The graph in the work folder, and its entry without figures."""
        name, precision = wanted.component, wanted.precision
        sets = self.probes.inputs(name) if precision == "mixed" else []
        reference = self.probes.reference.session(name).graph
        graph, exact = quantize.prepare(reference, lambda: load(self.checkpoint, name), precision, sets)
        traced = trace.to_onnx(graph, self.made / f"{name}.onnx", wanted.profile, wanted.opset)
        if precision.startswith("int8"):
            static = precision == "int8-static"
            calibration = Probes(self.checkpoint, self._count, (), CALIBRATION).inputs(name) if static else []
            traced = quantize.to_int8(traced, self.made, static, calibration)
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
