"""What the three training commands have in common: their flags, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from vlv.common.command import Misuse, Parser, say


def parser(stage: str, presets: Iterable[str], doc: str) -> argparse.ArgumentParser:
    """Flags --preset, --run, --out, --device and --debug of `python -m vlv.train.<stage>`."""
    p = Parser(prog=f"python -m vlv.train.{stage}", description=doc)
    p.add_argument("--preset", choices=sorted(presets), default="tiny", help="sizes and schedule")
    # the longer spelling is for torchrun, which takes --run for its own --run-path
    p.add_argument(
        "--run", "--run-folder", type=Path, help="folder of saves and logs; resumed if it exists (runs/PRESET)"
    )
    p.add_argument("--out", type=Path, help=f"what to write (RUN/{stage})")
    p.add_argument("--device", help="torch device: cpu, cuda, cuda:1 … (cpu; at scale: cuda if there is one)")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def folders(args: argparse.Namespace, stage: str) -> tuple[Path, Path]:
    """The folders of the run and of its result: what was given, or the defaults."""
    run = args.run or Path("runs") / args.preset
    return run, args.out or run / stage


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit with what it returns; 2 for misuse, 1 for a failure, 130 after Ctrl-C (its saves stay)."""
    try:
        if code := main():
            sys.exit(code)
    except KeyboardInterrupt:
        say("stopped; the same command continues from the last save")
        sys.exit(130)
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        sys.exit(2 if isinstance(error, Misuse) else 1)
