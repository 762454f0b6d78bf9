"""Artifacts against float32 PyTorch; every export ends with this.

Each output may be off by what its precision explains (`components.tolerance`), must be
finite and must depend on the input; uneven batches, the largest one and one more are tried; and greedy captions from
the embeddings must stay what they were. On failure the blocks of the graph are compared one by one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from export.components import PEAK, tolerance
from export.manifest import Artifact
from export.runtimes.base import Session
from export.verification.inputs import NOISE, VerificationInputs
from export.verification.layer_drift import drift
from vlv.checkpoints.folder import Checkpoint

AGREEMENT = 0.99  # of greedy tokens; float32 must keep every one
PATIENCE = 60.0  # seconds for one batch above which larger ones are left out


@dataclass(frozen=True)
class Captions:
    """Greedy captions of pictures from the reference's embeddings, and how many tokens another's embeddings keep."""

    llm: torch.nn.Module
    end: int
    expected: list[list[int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, prompts: Tensor) -> Captions:
        """prompts: the reference's embeddings, float32 [B, N, H]."""
        from vlv.model.captioner import Captioner

        captioner = Captioner.load(checkpoint)
        made = cls(captioner.llm, captioner.tokenizer.eos_token_id, [])
        made.expected.extend(made.write(prompts))
        return made

    @torch.inference_mode()
    def write(self, prompts: Tensor, tokens: int = 96) -> list[list[int]]:
        """Token ids, padded with end tokens to the longest caption."""
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=tokens, eos_token_id=self.end, pad_token_id=self.end)
        mask = torch.ones(prompts.shape[:2], dtype=torch.long)
        return self.llm.generate(inputs_embeds=prompts, attention_mask=mask, generation_config=config).tolist()

    def agreement(self, prompts: Tensor) -> dict:
        """Share of equal tokens, place by place, up to the end of the longer caption."""
        same = total = 0
        for found, expected in zip(self.write(prompts), self.expected, strict=True):
            found, expected = (row[: row.index(self.end) + 1] if self.end in row else row for row in (found, expected))
            total += max(len(found), len(expected))
            same += sum(a == b for a, b in zip(found, expected, strict=False))
        return {"images": len(self.expected), "tokens": total, "agreement": same / total}


def compare(found: Tensor, expected: Tensor) -> dict[str, float]:
    """The largest error over the largest magnitude, and the RMS error over the RMS."""
    difference = (found - expected).double()
    return {
        "max": (difference.abs().max() / expected.abs().max()).item(),
        "rms": (difference.square().mean() / expected.double().square().mean()).sqrt().item(),
    }


class Verifier:
    """Checks sessions of one checkpoint's components; references and captions are computed once."""

    def __init__(self, checkpoint: Checkpoint, probes: VerificationInputs, captions: bool = True):
        self.checkpoint, self.probes = checkpoint, probes
        self._with_captions = captions and "caption" in checkpoint.can
        self._captions: Captions | None = None
        self._expected: dict[str, list[dict[str, Tensor]]] = {}

    def check(self, artifact: Artifact, session: Session, folder: Path) -> dict:
        """The verification figures of an artifact; figures["problems"] is empty where all is well."""
        sets = self.probes.inputs(artifact.component)
        worst: dict[str, dict[str, float]] = {}
        problems: list[str] = []
        batches, found = self._run_batches(artifact, session, sets, problems)
        for results, expected in zip(found, self._references(artifact.component, sets), strict=True):
            for name, value in results.items():
                problems += _sane(name, value, expected[name])
                errors = compare(value, expected[name])
                kept = worst.setdefault(name, errors)
                worst[name] = {key: max(kept[key], errors[key]) for key in errors}
        graph = self.probes.reference.session(artifact.component).graph
        allowed = tolerance(artifact.precision, len(graph.blocks), graph.longest)
        for name, errors in worst.items():
            if not (errors["rms"] <= allowed and errors["max"] <= PEAK * allowed):
                problems.append(
                    f"{name} is off by {errors['rms']:.1e} RMS, {errors['max']:.1e} at most; "
                    f"{artifact.precision} explains {allowed:.1e} and {PEAK * allowed:.1e}"
                )
        figures = {
            "reference": "float32 PyTorch", "images": self.probes.described, "batches": batches, "outputs": worst,
            "allowed": {"rms": allowed, "max": PEAK * allowed}, "captions": None, "problems": problems,
        }  # fmt: skip
        if artifact.component == "encoder" and self._with_captions:
            figures["captions"] = self._agreement(artifact, found[0]["prompts"], problems)
        if problems and artifact.runtime == "onnx":
            figures["blocks"] = drift(artifact, folder, graph, sets[0])
            first = next((b["block"] for b in figures["blocks"] if b["drifts"]), None)
            if first:
                problems.append(f"the first block that drifts is {first}")
        return figures

    def _references(self, component: str, sets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if component not in self._expected:
            session = self.probes.reference.session(component)
            with torch.inference_mode():
                self._expected[component] = [session(**inputs) for inputs in sets]
        return self._expected[component]

    def _run_batches(self, artifact: Artifact, session: Session, sets: list[dict], problems: list[str]):
        """The outputs on all probes, and the batch sizes that were tried on the way.

        The probes run in one batch if they fit; every odd size must give the same rows, up to the order of sums.
        """
        outputs = [_in_batches(session, inputs, artifact.profile.most) for inputs in sets]
        rows, tried = _rows(sets[0], artifact), []
        limit = tolerance("fp32", 1, self.probes.reference.session(artifact.component).graph.longest) * PEAK
        if artifact.precision != "fp32":  # a batch of its own may round a few results the other way
            limit = tolerance(artifact.precision, 1, 1) * PEAK
        for size in artifact.profile.odd:
            start = time.monotonic()
            results = session(**_take(sets[0], artifact, [i % rows for i in range(size)]))
            tried.append(size)
            for name, value in results.items():
                expected = outputs[0][name][[i % rows for i in range(size)]]
                if not (error := compare(value.cpu(), expected)["max"]) <= limit:
                    problems.append(f"{name} in a batch of {size} differs from the same rows in another by {error:.1e}")
            if time.monotonic() - start > PATIENCE:
                break
        try:
            session(**_take(sets[0], artifact, [0] * (artifact.profile.most + 1)))
            problems.append(f"a batch of {artifact.profile.most + 1} ran, although {artifact.profile.most} is the most")
        except ValueError:
            pass
        return tried, outputs

    def _agreement(self, artifact: Artifact, prompts: Tensor, problems: list[str]) -> dict:
        if self._captions is None:
            reference = self._references("encoder", self.probes.inputs("encoder"))
            self._captions = Captions.of(self.checkpoint, reference[0]["prompts"][:-NOISE])
        found = self._captions.agreement(prompts[:-NOISE])  # a caption of noise says nothing, and hangs on nothing
        wanted = 1.0 if artifact.precision == "fp32" else AGREEMENT
        if found["agreement"] < wanted:
            problems.append(
                f"captions change: {found['agreement']:.1%} of {found['tokens']} greedy tokens stay, {wanted:.0%} must"
            )
        return found


def _rows(inputs: dict[str, Tensor], artifact: Artifact) -> int:
    return len(inputs[next(p.name for p in artifact.inputs if p.batched)])


def _take(inputs: dict[str, Tensor], artifact: Artifact, rows: list[int]) -> dict[str, Tensor]:
    batched = {port.name for port in artifact.inputs if port.batched}
    return {name: value[rows] if name in batched else value for name, value in inputs.items()}


def _in_batches(session: Session, inputs: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """All rows, in batches that the graph takes; on the CPU."""
    batched = {port.name for port in session.inputs if port.batched}
    total = len(inputs[next(iter(batched))])
    parts: list[dict[str, Tensor]] = []
    for i in range(0, total, most):
        part = {name: value[i : i + most] if name in batched else value for name, value in inputs.items()}
        parts.append({name: value.cpu() for name, value in session(**part).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _sane(name: str, value: Tensor, expected: Tensor) -> list[str]:
    """Failures that no tolerance covers: numbers that are none, and outputs that ignore the input."""
    if not value.isfinite().all():
        return [f"{name} has {int((~value.isfinite()).sum())} values that are not finite: the precision overflows"]
    flat, wanted = value.flatten(1), expected.flatten(1)
    dead = [i for i in range(len(flat)) if flat[i].std() == 0 and wanted[i].std() > 0]
    if dead:
        return [f"{name} is constant in row {dead[0]}: a black picture, or the like"]
    if len(flat) > 1 and (flat == flat[0]).all() and not (wanted == wanted[0]).all():
        return [f"{name} is the same for every input"]
    return []


def hopeless(figures: dict) -> bool:
    """Whether a failed artifact is useless whatever the user allows."""
    return any("not finite" in p or "constant" in p or "same for every" in p for p in figures["problems"])
