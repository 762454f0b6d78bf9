"""Build kernels ahead of time, without a GPU: PTX, cubin and a manifest that kernels.aot.load launches from."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm120")
DTYPES = ("bfloat16", "float16", "float32")
BASELINE = Path(__file__).parent / "baseline.json"
MANIFEST, FORMAT = "manifest.json", 1


def build(
    target: str, dtype: str, parts: tuple[str, ...], out: Path | None, turn: slice = slice(None)
) -> dict[str, dict]:
    """Build the launches of one architecture, or only those whose turn it is; the files go to `out`/`target`.

    Returns the manifest's entries.
    """
    import torch

    from kernels.aot.cases import launches
    from kernels.aot.compile import compile_launch

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
