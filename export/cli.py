"""What the commands of this room have in common: flags, how bad input is told, and the exit codes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from vlv.common.command import Misuse, Parser, hush, one_line, positive, say

EXIT_CODES = "exit codes: 0 done; 1 it failed, or an artifact drifts; 2 wrong arguments; 130 stopped by Ctrl-C."


def parser(module: str, doc: str) -> Parser:
    """The parser of `python -m export.<module>`, with --debug."""
    p = Parser(
        prog=f"python -m export.{module}",
        description=doc,
        epilog=EXIT_CODES,
    )
    debug_argument(p)
    return p


def debug_argument(p: argparse.ArgumentParser) -> None:
    """The flag --debug."""
    p.add_argument("--debug", action="store_true", help="show tracebacks")


def probe_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that say what artifacts are checked on."""
    p.add_argument("--probes", type=_probes, default=8, metavar="N", help="pictures to check on, two of them noise (8)")
    p.add_argument("--images", type=Path, nargs="+", default=[], metavar="FILE", help="photos to check on first")
    p.add_argument(
        "--captions", action=argparse.BooleanOptionalAction, default=True,
        help="compare greedy captions too (default); --no-captions spares loading the language model",
    )  # fmt: skip


def _probes(text: str) -> int:
    if (count := positive(text)) < 4:
        raise argparse.ArgumentTypeError(f"{count} are too few: at least 4, since two of them are noise")
    return count


def checkpoint(name: str):
    """The checkpoint of --ckpt. Raises Misuse."""
    from vlv.checkpoints.folder import CheckpointError
    from vlv.checkpoints.published import resolve

    try:
        return resolve(name)
    except CheckpointError as error:
        raise Misuse(f"--ckpt: {error}") from error


def components(asked: list[str] | None, checkpoint) -> list[str]:
    """The names of --components; by default all that the checkpoint has. Raises Misuse."""
    from export.components import COMPONENTS

    there = [c.name for c in COMPONENTS.values() if c.needs == "encoder" or "reconstruct" in checkpoint.can]
    if wrong := [name for name in asked or () if name not in there]:
        raise Misuse(f"--components {wrong[0]}: {checkpoint.folder} has no t2i/, only its encoder can be exported")
    return asked or there


def run(args: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Run a command, and turn whatever happens into one sentence and an exit code."""
    try:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        hush()
        return command(args)
    except KeyboardInterrupt:
        say("stopped; what is finished is kept, and the same command goes on from there")
        return 130
    except Exception as error:
        if args.debug:
            raise
        say(f"error: {_sentence(error)}")
        return 2 if isinstance(error, Misuse) else 1


def _sentence(error: Exception) -> str:
    from export.manifest import ArtifactError
    from vlv.checkpoints.folder import CheckpointError
    from vlv.data.image import ImageError

    if isinstance(error, Misuse | ArtifactError | CheckpointError | ImageError | OSError):
        return str(error)
    return f"{one_line(error)} (unexpected: --debug shows where)"
