"""Hold artifacts against float32 PyTorch: python -m export.verify --artifacts DIR --ckpt DIR [--runtime onnx]

The same checks that end every export, on any runtime that this machine has; prints a table of the figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export import cli
from export.components import COMPONENTS
from export.manifest import Artifact, name_of


def table(artifacts: list[Artifact]) -> str:
    """The figures as text, a line an output."""
    head = ("artifact", "precision", "output", "max error", "rms error", "allowed", "batches", "captions", "verdict")
    lines = [head]
    for artifact in artifacts:
        figures = artifact.verification
        captions = figures.get("captions") or {}
        for name, errors in _summed(figures.get("outputs", {})).items():
            lines.append((
                artifact.name, artifact.precision, name, f"{errors['max']:.1e}", f"{errors['rms']:.1e}",
                f"{figures['allowed']['rms']:.1e}", ",".join(map(str, figures["batches"])),
                f"{captions['agreement']:.1%}" if captions else "-", "drifts" if figures["problems"] else "ok",
            ))  # fmt: skip
        if not figures:
            lines.append((artifact.name, artifact.precision, *["-"] * 6, "not run here"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _summed(outputs: dict[str, dict]) -> dict[str, dict]:
    """The keys and values of all layers in one line."""
    layers = {name: errors for name, errors in outputs.items() if name.startswith("kv_")}
    if not layers:
        return outputs
    return {f"kv ({len(layers)})": {key: max(e[key] for e in layers.values()) for key in ("max", "rms")}}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = cli.parser("verify", __doc__)
    p.add_argument("--artifacts", type=Path, required=True, metavar="DIR", help="what an export wrote")
    p.add_argument("--ckpt", required=True, metavar="DIR", help="the checkpoint that it was made from")
    p.add_argument("--runtime", default="onnx", choices=("onnx", "onnx-cuda", "onnx-trt", "trt", "rtx"))
    cli.probe_arguments(p)
    return cli.run(p.parse_args(argv), _verify)


def _verify(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from export.manifest import ArtifactError, Manifest
    from export.runtimes.base import open_runtime
    from export.verification.inputs import VerificationInputs
    from export.verification.verifier import Verifier

    checkpoint = cli.checkpoint(args.ckpt)
    manifest = Manifest.open(args.artifacts)
    engine = open_runtime(args.runtime, args.artifacts, checkpoint)
    verifier = Verifier(checkpoint, VerificationInputs(checkpoint, args.probes, args.images), args.captions)
    checked = []
    for name in COMPONENTS:
        if name_of(name, engine.runtime, engine.target) in manifest.artifacts:
            session = engine.session(name)  # its files are checked before they are loaded
            artifact = manifest.find(name, engine.runtime, engine.target)
            checked.append(replace(artifact, verification=verifier.check(artifact, session, args.artifacts)))
    if not checked:
        raise ArtifactError(
            f"{args.artifacts} has nothing for {args.runtime} {engine.target}: it has {', '.join(manifest.artifacts)}"
        )
    print(table(checked))
    failed = [f"{a.name}: {problem}" for a in checked for problem in a.verification["problems"]]
    for problem in failed:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
