"""Verify artifacts against float32 PyTorch; every export ends with this.

The error of each output must be explained by its precision (`components.tolerance`); outputs must be finite and depend
on the input; uneven batches, the largest batch and one more row than that are tried; and greedy captions from the
embeddings must stay the same. The encoder upsamples, so images with content at the borders are compared as well. On
failure the blocks of the graph are compared one by one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from export.components import COMPONENTS, PEAK, tolerance
from export.manifest import Artifact, ArtifactError, name_of
from export.runtimes.base import ArtifactRuntime, Session
from export.verification.captions import Captions
from export.verification.inputs import NOISE, VerificationInputs, border_images
from export.verification.layer_drift import compare, drift
from vlv.checkpoints.folder import Checkpoint

AGREEMENT = 0.99  # share of greedy tokens that must stay; float32 must keep every one
# 8-bit graphs are not compared at the borders: their error hides the difference, and they upsample as the float32 or
# float16 graph that they are made from
FLOATS = ("fp32", "fp16", "mixed", "bf16")
Sets = tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]
MAX_SECONDS = 60.0  # for one batch; after a slower one, larger batches are left out


class Verifier:
    """Verify sessions of one checkpoint's components; references and captions are computed once."""

    def __init__(self, checkpoint: Checkpoint, inputs: VerificationInputs, captions: bool = True):
        self.checkpoint = checkpoint
        self.inputs = inputs
        self._with_captions = captions and "caption" in checkpoint.can
        self._captions: Captions | None = None
        self._references: dict[str, Sets] = {}
        self._at_borders: dict[str, Tensor] = {}

    def check_all(self, runtime: ArtifactRuntime) -> list[Artifact]:
        """Return all artifacts of a runtime, in the order of COMPONENTS, with new figures.

        Raises ArtifactError if there is none.
        """
        manifest, checked = runtime.manifest, []
        for name in COMPONENTS:
            if name_of(name, runtime.runtime, runtime.target) in manifest.artifacts:
                session = runtime.session(name)  # checks the files before it loads them
                artifact = manifest.find(name, runtime.runtime, runtime.target)
                checked.append(replace(artifact, verification=self.check(artifact, session, manifest.folder)))
        if not checked:
            raise ArtifactError(
                f"{manifest.folder} has nothing for {' '.join([runtime.word, runtime.target]).strip()}: "
                f"it has {', '.join(manifest.artifacts) or 'no artifacts'}"
            )
        return checked

    def check(self, artifact: Artifact, session: Session, folder: Path) -> dict:
        """Return the verification figures of an artifact; figures["problems"] is empty if it passes."""
        sets, references = self.references(artifact.component)
        worst: dict[str, dict[str, float]] = {}
        problems: list[str] = []
        batches, found = self._run_batches(artifact, session, sets, problems)
        for results, expected in zip(found, references, strict=True):
            for name, value in results.items():
                problems += _garbage(name, value, expected[name])
                errors = compare(value, expected[name])
                previous = worst.setdefault(name, errors)
                worst[name] = {key: max(previous[key], errors[key]) for key in errors}
        graph = self.inputs.reference.session(artifact.component).graph
        allowed = tolerance(artifact.precision, len(graph.blocks), graph.longest_sum)
        for name, errors in worst.items():
            if not (errors["rms"] <= allowed and errors["max"] <= PEAK * allowed):
                problems.append(
                    f"{name} is off by {errors['rms']:.1e} RMS, {errors['max']:.1e} at most; "
                    f"{artifact.precision} explains {allowed:.1e} and {PEAK * allowed:.1e}"
                )
        figures = {
            "reference": "float32 PyTorch",
            "images": self.inputs.described,
            "batches": batches,
            "outputs": worst,
            "allowed": {"rms": allowed, "max": PEAK * allowed},
            "captions": None,
            "problems": problems,
        }
        if artifact.component == "encoder" and artifact.precision in FLOATS:
            figures["borders"] = self._check_borders(artifact, session, allowed, worst, problems)
        if artifact.component == "encoder" and self._with_captions:
            figures["captions"] = self._agreement(artifact, session, problems)
        if problems and artifact.runtime == "onnx":
            figures["blocks"] = drift(artifact, folder, graph, sets[0])
            first = next((b["block"] for b in figures["blocks"] if b["drifts"]), None)
            if first:
                problems.append(f"the first block that drifts is {first}")
        return figures

    def references(self, component: str) -> Sets:
        """Return the inputs of a component, and the outputs of float32 PyTorch on them, computed once.

        Raises ArtifactError where those are not finite: such a checkpoint has no right values.
        """
        if component not in self._references:
            session, sets = self.inputs.reference.session(component), self.inputs.inputs(component)
            with torch.inference_mode():
                expected = [session(**inputs) for inputs in sets]
            if wrong := [n for outputs in expected for n, value in outputs.items() if not value.isfinite().all()]:
                weights = [n for n, weight in session.graph.named_parameters() if not weight.isfinite().all()]
                cause = f"{weights[0]} is not finite" if weights else "its values overflow"
                raise ArtifactError(
                    f"{component}: {wrong[0]} is not finite in float32 PyTorch either, since {cause}: "
                    "copy the checkpoint again, or take an earlier one"
                )
            self._references[component] = sets, expected
        return self._references[component]

    def _check_borders(
        self, artifact: Artifact, session: Session, allowed: float, elsewhere: dict, problems: list[str]
    ) -> dict:
        """Return the largest errors over images with content at the borders; `elsewhere`: those over other images.

        Each image is compared by itself. A resize that reads pixels beyond the border can stay within the tolerance of
        float16 on photos and noise, where few pixels lie there.
        """
        images = border_images(self.inputs.images.shape[-1])
        if not self._at_borders:
            with torch.inference_mode():
                self._at_borders = self.inputs.reference.session("encoder")(pixels=images)
        worst = {}
        for name, value in _in_batches(session, {"pixels": images}, artifact.profile.max).items():
            errors = [compare(*pair) for pair in zip(value, self._at_borders[name], strict=True)]
            worst[name] = {key: max(e[key] for e in errors) for key in errors[0]}
            if not all(e["rms"] <= allowed and e["max"] <= PEAK * allowed for e in errors):
                is_larger = worst[name]["rms"] > 2 * elsewhere[name]["rms"]
                hint = ": does a resize read pixels beyond the border?" if is_larger else ""
                problems.append(
                    f"{name} of images with content at the borders is off by {worst[name]['rms']:.1e} RMS, "
                    f"{worst[name]['max']:.1e} at most; {artifact.precision} explains {allowed:.1e} and "
                    f"{PEAK * allowed:.1e}{hint}"
                )
        return worst

    def _run_batches(self, artifact: Artifact, session: Session, sets: list[dict], problems: list[str]):
        """Return the batch sizes that were tried, and the outputs on all inputs.

        The inputs run in one batch if they fit; every odd size must give the same rows, up to the order of sums.
        """
        outputs = [_in_batches(session, inputs, artifact.profile.max) for inputs in sets]
        rows, tried = _rows(sets[0], artifact), []
        limit = tolerance("fp32", 1, self.inputs.reference.session(artifact.component).graph.longest_sum) * PEAK
        if artifact.precision != "fp32":  # another batch size may round a few results the other way
            limit = tolerance(artifact.precision, 1, 1) * PEAK
        for size in artifact.profile.odd:
            start = time.monotonic()
            results = session(**_take(sets[0], artifact, [i % rows for i in range(size)]))
            tried.append(size)
            for name, value in results.items():
                expected = outputs[0][name][[i % rows for i in range(size)]]
                if not (error := compare(value.cpu(), expected)["max"]) <= limit:
                    problems.append(f"{name} in a batch of {size} differs from the same rows in another by {error:.1e}")
            if time.monotonic() - start > MAX_SECONDS:
                break
        try:
            largest = artifact.profile.max
            session(**_take(sets[0], artifact, [0] * (largest + 1)))
            problems.append(f"a batch of {largest + 1} ran, although {largest} is the maximum")
        except ValueError:
            pass
        return tried, outputs

    def _agreement(self, artifact: Artifact, session: Session, problems: list[str]) -> dict:
        if self._captions is None:
            images = self.inputs.images[:-NOISE]  # captions of noise depend on nothing that matters
            self._captions = Captions(self.checkpoint, self.inputs.reference, images, self.inputs.seed)
        required = 1.0 if artifact.precision == "fp32" else AGREEMENT
        found = self._captions.agreement(
            lambda images: _in_batches(session, {"pixels": images}, artifact.profile.max)["prompts"],
            required,
            more=not problems,  # with problems the verdict is there already
        )
        if not found.passes(required):
            problems.append(
                f"captions change: {found.agreement:.1%} of {found.tokens} greedy tokens stay, {required:.0%} must"
                + ("" if required == 1 else f" (standard error {found.error:.1%})")
            )
        return asdict(found)


def _rows(inputs: dict[str, Tensor], artifact: Artifact) -> int:
    return len(inputs[next(p.name for p in artifact.inputs if p.batched)])


def _take(inputs: dict[str, Tensor], artifact: Artifact, rows: list[int]) -> dict[str, Tensor]:
    batched = {port.name for port in artifact.inputs if port.batched}
    return {name: value[rows] if name in batched else value for name, value in inputs.items()}


def _in_batches(session: Session, inputs: dict[str, Tensor], largest: int) -> dict[str, Tensor]:
    """Run all rows in batches that the graph takes; return outputs on the CPU."""
    batched = {port.name for port in session.inputs if port.batched}
    total = len(inputs[next(iter(batched))])
    parts: list[dict[str, Tensor]] = []
    for i in range(0, total, largest):
        part = {name: value[i : i + largest] if name in batched else value for name, value in inputs.items()}
        parts.append({name: value.cpu() for name, value in session(**part).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _garbage(name: str, value: Tensor, expected: Tensor) -> list[str]:
    """Return failures that no tolerance covers: values that are not finite, and outputs that ignore the input."""
    if not value.isfinite().all():
        return [f"{name} has {int((~value.isfinite()).sum())} values that are not finite: the precision overflows"]
    flat, reference = value.flatten(1), expected.flatten(1)
    constant = [i for i in range(len(flat)) if flat[i].std() == 0 and reference[i].std() > 0]
    if constant:
        return [f"{name} is constant in row {constant[0]}, as a black image is"]
    if len(flat) > 1 and (flat == flat[0]).all() and not (reference == reference[0]).all():
        return [f"{name} is the same for every input"]
    return []


def hopeless(figures: dict) -> bool:
    """Return True if a failed artifact is useless, whatever the user allows."""
    return any("not finite" in p or "constant" in p or "same for every" in p for p in figures["problems"])
