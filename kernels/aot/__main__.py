"""Build every kernel ahead of time, without a GPU: PTX, cubin and a manifest that kernels.aot.load launches from.

    python -m kernels.aot --target sm80,sm86,sm89,sm90,sm120 --out builds/kernels
    python -m kernels.aot --target sm90 --check          # fail on spills that kernels/aot/baseline.json does not list
    python -m kernels.aot --target sm80,sm90 --check --in-turn      # the same in half the time: a sample of each

The shapes are those of the published encoder and of SD 2.1's UNet (kernels/aot/cases.py); the configurations those
of kernels/tuned.json. Needs Triton, whose ptxas comes with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from kernels.aot.manifest import BASELINE, DTYPES, PARTS, TARGETS, new_spills, summary, write_manifest


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot",
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", default="sm90", metavar="SM,SM", help=f"of {','.join(TARGETS)} (default: sm90)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="data type of the tensors (default: bfloat16)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P,P", help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for PTX, cubin and manifest")
    parser.add_argument("--check", action="store_true", help="exit 1 on spills that the baseline does not list")
    parser.add_argument("--in-turn", action="store_true", help="build every launch for one of the targets, in turn")
    parser.add_argument("--write-baseline", action="store_true", help="record registers and spills as the baseline")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    targets, parts = args.target.split(","), tuple(args.parts.split(","))
    for name, given, valid in (("target", targets, TARGETS), ("parts", parts, PARTS)):
        if wrong := [one for one in given if one not in valid]:
            parser.error(f"--{name} {wrong[0]}: choose from {', '.join(valid)}")
    if args.in_turn and (args.out or args.write_baseline):
        parser.error("--in-turn builds a sample, for --check alone")
    if find_spec("triton") is None:
        print("error: building needs Triton: pip install triton", file=sys.stderr)
        return 1
    try:
        from kernels.aot.build import build

        turns = [slice(i, None, len(targets)) if args.in_turn else slice(None) for i in range(len(targets))]
        builds = {t: build(t, args.dtype, parts, args.out, turn) for t, turn in zip(targets, turns, strict=True)}
        if args.out:
            write_manifest(args.out, args.dtype, builds)
    except (OSError, ValueError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    problems = [
        f"{target}: {problem}"
        for target, entries in builds.items()
        for problem in new_spills(entries, baseline.get(target, {}))
    ]
    if args.write_baseline:
        baseline |= {target: summary(entries) for target, entries in builds.items()}
        BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
    elif args.check and problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
