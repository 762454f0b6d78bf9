"""Build kernels ahead of time, without a GPU: PTX and cubin files that kernels.aot.load launches."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from kernels.aot.cases import launches
from kernels.aot.compile import compile_launch, signature


def build(
    target: str, dtype: str, parts: tuple[str, ...], out: Path | None, turn: slice = slice(None)
) -> dict[str, dict]:
    """Build the launches of one architecture, or those that `turn` selects; write the files to `out`/`target`.

    Returns the manifest's entries by key. Raises ValueError where a launch cannot be built.
    """
    entries = {}
    distinct = dict(list(launches(target, getattr(torch, dtype), parts).items())[turn])
    for count, (key, start) in enumerate(distinct.items(), 1):
        _progress(f"{target}: {count} of {len(distinct)}", last=count == len(distinct))
        built = compile_launch(start, int(target.removeprefix("sm")))
        name = f"{start.kernel}.{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        entries[key] = {
            "kernel": start.kernel,
            "file": f"{target}/{name}",
            "symbol": built.symbol,
            "arguments": signature(start),
            "constants": start.constants,
            "warps": built.warps,
            "shared": built.shared,
            "registers": built.registers,
            "spills": built.spills,
            "sha256": hashlib.sha256(built.cubin).hexdigest(),
        }
        if out:
            (out / target).mkdir(parents=True, exist_ok=True)
            (out / target / f"{name}.cubin").write_bytes(built.cubin)
            (out / target / f"{name}.ptx").write_text(built.ptx)
    return entries


def _progress(text: str, last: bool) -> None:
    """Show progress on stderr: in one line of a terminal, elsewhere the last state only."""
    if sys.stderr.isatty():
        print(f"\r{text} ", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr, flush=True)
