"""The manifest of a folder of ahead-of-time builds, and the committed baseline of registers and spills."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm120")
DTYPES = ("bfloat16", "float16", "float32")
PARTS = ("encoder", "fp8", "unet", "training")
BASELINE = Path(__file__).parent / "baseline.json"
MANIFEST, FORMAT = "manifest.json", 2


def write_manifest(out: Path, dtype: str, builds: dict[str, dict[str, dict]]) -> None:
    """Write the manifest atomically and last, so that an interrupted build has none."""
    try:
        triton_version = version("triton")
    except PackageNotFoundError:  # a build from source
        triton_version = "unknown"
    content = {"format": FORMAT, "triton": triton_version, "dtype": dtype, "targets": builds}
    temporary = out / (MANIFEST + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(out / MANIFEST)


def summary(entries: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return registers, spills and shared memory by key: what the committed baseline keeps."""
    return {key: {name: entry[name] for name in ("registers", "spills", "shared")} for key, entry in entries.items()}


def new_spills(found: dict[str, dict], baseline: dict[str, dict]) -> list[str]:
    """Return a sentence for each build that spills more than the baseline (more than 0 where it has no entry)."""
    allowed = {key: baseline.get(key, {}).get("spills", 0) for key in found}
    return [
        f"{key} spills {entry['spills']} bytes of a thread, {allowed[key]} before"
        for key, entry in found.items()
        if entry["spills"] > allowed[key]
    ]
