"""Check whether the caption check of an export decides alike whichever scenes are drawn: five seeds, bundled model.

    python -m benchmarks.caption_verdict --precision fp8 --out benchmarks/caption_verdict.json

Every choice of blocks that the export tries is made once, and checked with each seed's own scenes, the most exact
choice first. The export keeps the first that passes, so the verdict of a seed is whether any does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

from vlv.common.command import Parser, UserError, command_line, positive, run_command, say
from vlv.common.files import write_json

CKPT = Path(__file__).resolve().parents[1] / "assets" / "vlv-tiny"


def work(args: argparse.Namespace) -> None:
    import torch

    from benchmarks import machine
    from export import onnx
    from export.manifest import Manifest
    from export.quantize import precision
    from export.runtimes.factory import open_runtime
    from export.verification.captions import Captions
    from export.verification.inputs import NOISE, VerificationInputs
    from export.verification.verifier import AGREEMENT
    from vlv.checkpoints.folder import Checkpoint

    checkpoint = Checkpoint.open(CKPT)
    inputs = [VerificationInputs(checkpoint, 6, seed=seed) for seed in range(args.seeds)]
    captions = [Captions(checkpoint, i.reference, i.images[:-NOISE], seed) for seed, i in enumerate(inputs)]
    costs = precision.block_costs(inputs[0].reference.session("encoder").graph)
    report = {
        "command": command_line("benchmarks.caption_verdict"), "kind": "caption_verdict",
        "machine": machine.describe(), "precision": args.precision, "required": AGREEMENT, "choices": [],
    }  # fmt: skip
    for excluded in reversed(precision.exclusion_candidates(costs)):
        with tempfile.TemporaryDirectory() as folder:
            command = ["--ckpt", str(CKPT), "--out", folder, "--components", "encoder", "--precision", args.precision]
            only = patch.object(precision, "exclusion_candidates", lambda costs, excluded=excluded: [excluded])
            with only, redirect_stdout(sys.stderr):
                if onnx.main([*command, "--no-captions", "--allow-drift"]):
                    raise UserError(f"the export in {args.precision} failed")
            largest = Manifest.open(Path(folder)).checked("encoder").profile.max
            runtime = open_runtime("onnx", Path(folder), checkpoint)

            def encode(images, runtime=runtime, largest=largest):
                return torch.cat([runtime.encode(part) for part in images.split(largest)])

            seeds = []
            for seed, of_seed in enumerate(captions):
                found = of_seed.agreement(encode, AGREEMENT)
                seeds.append(asdict(found) | {"seed": seed, "passes": found.passes(AGREEMENT)})
                say(f"{len(excluded)} blocks excluded, {json.dumps(seeds[-1])}")
        report["choices"].append({"excluded_blocks": len(excluded), "seeds": seeds})
        verdicts = [any(c["seeds"][s]["passes"] for c in report["choices"]) for s in range(args.seeds)]
        report |= {"verdicts": verdicts, "same": len(set(verdicts)) == 1}
        if args.out:
            write_json(args.out, report, 1)
    print(json.dumps({key: report[key] for key in ("precision", "verdicts", "same")}))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = Parser(prog="python -m benchmarks.caption_verdict", description=__doc__)
    p.add_argument("--precision", choices=("int8", "int8-static", "int8-trt", "fp8"), default="fp8", help="(fp8)")
    p.add_argument("--seeds", type=positive, default=5, help="draws of scenes (5)")
    p.add_argument("--out", type=Path, help="JSON file of the figures")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(work, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
