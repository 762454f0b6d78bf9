"""Build every kernel ahead of time, without a GPU: PTX, cubin and a manifest that kernels.aot_loader launches from.

    python -m kernels.aot --target sm80,sm86,sm89,sm90,sm120 --out builds/kernels
    python -m kernels.aot --target sm90 --check          # fail on spills that kernels/aot_baseline.json does not list
    python -m kernels.aot --target sm80,sm90 --check --in-turn      # the same in half the time: a sample of each

The shapes are those of the published encoder and of SD 2.1's UNet (kernels/aot_cases.py); the configurations those
of kernels/tuned.json. Needs Triton, whose ptxas comes with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm120")
DTYPES = ("bfloat16", "float16", "float32")
BASELINE = Path(__file__).parent / "aot_baseline.json"
MANIFEST, FORMAT = "manifest.json", 1


def build(
    target: str, dtype: str, parts: tuple[str, ...], out: Path | None, turn: slice = slice(None)
) -> dict[str, dict]:
    """Build the launches of one architecture, or only those whose turn it is; the files go to `out`/`target`.

    Returns the manifest's entries.
    """
    import torch

    from kernels.aot_cases import launches
    from kernels.compile import compile_launch

    entries = {}
    distinct = dict(list(launches(target, getattr(torch, dtype), parts).items())[turn])
    for count, (key, start) in enumerate(distinct.items(), 1):
        print(f"\r{target}: {count} of {len(distinct)} ", end="", file=sys.stderr, flush=True)
        built = compile_launch(start, int(target.removeprefix("sm")))
        name = f"{start.kernel}.{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        entries[key] = {
            "kernel": start.kernel, "file": f"{target}/{name}", "symbol": built.symbol, "arguments": start.signature(),
            "constants": start.constants, "grid": start.grid, "warps": built.warps, "shared": built.shared,
            "registers": built.registers, "spills": built.spills, "sha256": hashlib.sha256(built.cubin).hexdigest(),
        }  # fmt: skip
        if out:
            (out / target).mkdir(parents=True, exist_ok=True)
            (out / target / f"{name}.cubin").write_bytes(built.cubin)
            (out / target / f"{name}.ptx").write_text(built.ptx)
    print(file=sys.stderr)
    return entries


def summary(entries: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Registers, spills and shared memory by key: what the committed baseline keeps."""
    return {key: {name: entry[name] for name in ("registers", "spills", "shared")} for key, entry in entries.items()}


def new_spills(found: dict[str, dict], baseline: dict[str, dict]) -> list[str]:
    """A sentence for each build that spills more than the baseline's (not at all, where it has none)."""
    allowed = {key: baseline.get(key, {}).get("spills", 0) for key in found}
    return [
        f"{key} spills {entry['spills']} bytes of a thread, {allowed[key]} before"
        for key, entry in found.items()
        if entry["spills"] > allowed[key]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="sm90", help=f"architectures, with commas: {','.join(TARGETS)} (sm90)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the tensors (bfloat16)")
    parser.add_argument("--parts", default="encoder,unet,training", help="of encoder, unet, training (all)")
    parser.add_argument("--out", type=Path, help="folder for PTX, cubin and manifest")
    parser.add_argument("--check", action="store_true", help="exit 1 on spills that the baseline does not list")
    parser.add_argument("--in-turn", action="store_true", help="build every launch for one of the targets, in turn")
    parser.add_argument("--write-baseline", action="store_true", help="record registers and spills as the baseline")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    targets, parts = args.target.split(","), tuple(args.parts.split(","))
    for name, given, valid in (("target", targets, TARGETS), ("parts", parts, ("encoder", "unet", "training"))):
        if wrong := [one for one in given if one not in valid]:
            parser.error(f"--{name} {wrong[0]}: choose from {', '.join(valid)}")
    if args.in_turn and (args.out or args.write_baseline):
        parser.error("--in-turn builds a sample, for --check alone")
    if find_spec("triton") is None:
        print("error: building needs Triton: pip install triton", file=sys.stderr)
        return 1
    try:
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


def write_manifest(out: Path, dtype: str, builds: dict[str, dict[str, dict]]) -> None:
    """The manifest, written last and whole, so that a stopped build leaves none."""
    try:
        triton_version = version("triton")
    except PackageNotFoundError:  # a build from source
        triton_version = "unknown"
    content = {"format": FORMAT, "triton": triton_version, "dtype": dtype, "targets": builds}
    temporary = out / (MANIFEST + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(out / MANIFEST)


if __name__ == "__main__":
    sys.exit(main())
