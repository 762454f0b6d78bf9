"""Choose default configurations for each architecture by the number of warps that a multiprocessor can hold.

    python -m kernels.occupancy --target sm80,sm90       # rewrites those entries of kernels/tuned.json; no GPU needed

A model, not a measurement: of the candidates in kernels.runtime.tuning it takes the first that spills nothing and fills
a quarter of the warps (more rarely helps a kernel that reads long rows), else the one that spills least and fills most.
The entries say "untested"; `python -m benchmarks.gpu.kernels --tune` measures on a real GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace

from kernels.aot.manifest import TARGETS
from kernels.runtime.tuning import FILE, candidates, split

# PyTorch's own attention is a well-tuned kernel: ours replaces it only where it measured faster
REFERENCE = {"eager": {"attention": ["*"]}, "compiled": {"attention": ["*"]}}
ENOUGH = 0.25  # of a multiprocessor's warps


@dataclass(frozen=True)
class Multiprocessor:
    """Limits per multiprocessor: CUDA C programming guide, table of technical specifications."""

    warps: int
    shared: int  # bytes, for all blocks; each block takes 1 KiB more than it asks for
    blocks: int
    registers: int = 65536


LIMITS = {
    "sm80": Multiprocessor(64, 164 * 1024, 32), "sm86": Multiprocessor(48, 100 * 1024, 16),
    "sm89": Multiprocessor(48, 100 * 1024, 24), "sm90": Multiprocessor(64, 228 * 1024, 32),
    "sm120": Multiprocessor(48, 100 * 1024, 24),
}  # fmt: skip


def occupancy(limits: Multiprocessor, warps: int, registers: int, shared: int) -> float:
    """Return the share of a multiprocessor's warps that blocks of this size can fill; 0 where not even one fits."""
    if shared + 1024 > limits.shared:
        return 0.0
    per_warp = -(-registers * 32 // 256) * 256  # registers are allocated to a warp in units of 256
    by_registers = limits.registers // per_warp // warps
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // (shared + 1024))
    return blocks * warps / limits.warps


def choose(target: str) -> dict[str, dict[str, dict]]:
    """Return, by kernel and shape class, the chosen configuration and its figures."""
    from kernels.aot.cases import launches
    from kernels.aot.compile import compile_launch

    chosen: dict[str, dict[str, dict]] = {}
    for start in launches(target).values():
        if start.shape in chosen.setdefault(start.kernel, {}):
            continue
        tried = []
        for candidate in candidates(start.kernel, start.shape):
            constants, options = split(candidate)
            # descriptors need scratch memory, which an ahead-of-time launch does not have; designs wait for a GPU
            if constants.get("TMA") or constants.get("DESIGN"):
                continue
            trial = replace(start, constants={**start.constants, **constants}, options=options)
            built = compile_launch(trial, int(target.removeprefix("sm")))
            filled = occupancy(LIMITS[target], built.warps, built.registers, built.shared)
            figures = {"registers": built.registers, "spills": built.spills, "shared": built.shared}
            tried.append({"config": candidate, "occupancy": round(filled, 3), **figures})
            if not built.spills and filled >= ENOUGH:
                break
        best = min(tried, key=lambda one: (one["occupancy"] == 0, one["spills"], -one["occupancy"]))
        chosen[start.kernel][start.shape] = best
        print(f"{target} {start.kernel} {start.shape}: {best}", file=sys.stderr, flush=True)
    return chosen


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.occupancy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=",".join(TARGETS), metavar="SM,SM", help="architectures (default: all)")
    args = parser.parse_args()
    targets = args.target.split(",")
    if wrong := [target for target in targets if target not in LIMITS]:
        parser.error(f"--target {wrong[0]}: choose from {', '.join(LIMITS)}")
    for target in targets:
        kernels = choose(target)
        table = json.loads(FILE.read_text()) if FILE.exists() else {}
        table[target] = {"label": "untested: from the occupancy model", "reference": REFERENCE, "kernels": kernels}
        FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
