"""Export a checkpoint to ONNX, verified: python -m export.onnx --ckpt DIR --out ARTIFACTS

Each component becomes one graph, is run in ONNX Runtime on pictures and noise, and is held against float32 PyTorch;
what drifts is refused. Components that are there already, made from the same weights in the same way, are kept, so an
interrupted export goes on where it ended. The figures stand in ARTIFACTS/manifest.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from export import cli
from export.components import CALIBRATED, COMPONENTS, PRECISIONS, Batch, opset


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags of the command, which `export.trt` has too; imports nothing heavy."""
    p.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--out", type=Path, required=True, metavar="ARTIFACTS", help="folder of the artifacts")
    p.add_argument(
        "--components", nargs="+", choices=list(COMPONENTS), metavar="NAME",
        help=f"what to export: {', '.join(COMPONENTS)} (default: all that the checkpoint has)",
    )  # fmt: skip
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the inside (fp32)")
    p.add_argument("--max-batch", type=cli.positive, default=32, metavar="N", help="images encoded at once (32)")
    p.add_argument("--max-pictures", type=cli.positive, default=8, metavar="N", help="pictures drawn at once (8)")
    p.add_argument(
        "--calibrate", type=Path, nargs="+", default=[], metavar="FILE",
        help="photos to take ranges of activations from, others than --images (drawn scenes)",
    )  # fmt: skip
    p.add_argument("--allow-drift", action="store_true", help="keep an artifact that is too far off")
    p.add_argument("--force", action="store_true", help="make again what is there already")
    cli.probe_arguments(p)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = cli.parser("onnx", __doc__)
    add_arguments(p)
    return run(p.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Run the command on parsed flags; returns its exit code."""
    return cli.run(args, _export)


def _export(args: argparse.Namespace) -> int:
    if args.calibrate and args.precision not in CALIBRATED:
        raise cli.Misuse(f"--calibrate: {args.precision} has no ranges: add --precision {' or '.join(CALIBRATED)}")
    if twice := set(args.calibrate) & set(args.images):
        raise cli.Misuse(f"--calibrate {min(twice)}: also among --images: calibrate on others than are checked")
    checkpoint = cli.checkpoint(args.ckpt)
    names = cli.components(args.components, checkpoint)

    from export.exporter import Exporter
    from export.manifest import Manifest, workspace
    from export.verify import table

    failed = []
    with workspace(args.out) as made:
        manifest = Manifest.open_or_new(args.out)
        exporter = Exporter(checkpoint, manifest, made, args.probes, args.images, args.captions, args.calibrate)
        for name in names:
            profile = COMPONENTS[name].profile(Batch.up_to(args.max_batch), Batch.up_to(args.max_pictures, 2))
            wanted = exporter.plan(name, args.precision, opset(args.precision), profile, command(args, name))
            kept = None if args.force else exporter.manifest.current(wanted)
            if kept and (args.allow_drift or not kept.verification.get("problems")):
                cli.say(f"{name}: up to date")
                continue
            problems = exporter.export(wanted, args.allow_drift)
            failed += [f"{name}: {problem}" for problem in problems]
    manifest = Manifest.open_or_new(args.out)
    print(table([manifest.artifacts[name] for name in names if name in manifest.artifacts]))
    for problem in failed:
        cli.say(f"error: {problem}")
    return 1 if failed else 0


def command(args: argparse.Namespace, name: str, module: str = "export.onnx", more: Sequence[str] = ()) -> str:
    """What makes this one artifact again; more: flags of another module's own."""
    words = ["python", "-m", module, "--ckpt", args.ckpt, "--out", str(args.out), "--components", name, *more]
    words += ["--precision", args.precision, "--max-batch", str(args.max_batch)]
    words += ["--max-pictures", str(args.max_pictures), "--probes", str(args.probes)]
    words += ["--images", *map(str, args.images)] if args.images else []
    words += ["--calibrate", *map(str, args.calibrate)] if args.calibrate else []
    words += ["--allow-drift"] if args.allow_drift else []
    return shlex.join([*words, *([] if args.captions else ["--no-captions"])])


if __name__ == "__main__":
    sys.exit(main())
