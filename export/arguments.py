"""Define the flags that several commands of this package share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.common.command import Misuse, Parser, debug_argument, hush, positive

if TYPE_CHECKING:
    from vlv.checkpoints.folder import Checkpoint

EXIT_CODES = "exit codes: 0 done; 1 it failed, or an artifact drifts; 2 wrong arguments; 130 stopped by Ctrl-C."


def parser(module: str, doc: str | None) -> Parser:
    """Return the parser of `python -m export.<module>`, with --debug."""
    return Parser(prog=f"python -m export.{module}", description=doc, epilog=EXIT_CODES, parents=[debug_argument()])


def verification_arguments(p: argparse.ArgumentParser) -> None:
    """Add the flags for what artifacts are verified on."""
    p.add_argument(
        "--probes",
        dest="verification_inputs",
        type=_verification_inputs,
        default=8,
        metavar="N",
        help="images to verify on, two of them noise (default: 8)",
    )
    p.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="photos to verify on, before synthetic scenes fill up --probes",
    )
    p.add_argument(
        "--captions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare greedy captions too (default); --no-captions does not load the language model",
    )


def _verification_inputs(text: str) -> int:
    if (count := positive(text)) < 4:
        raise argparse.ArgumentTypeError(f"{count} are too few: at least 4, since two of them are noise")
    return count


def open_checkpoint(name: str) -> Checkpoint:
    """Resolve the checkpoint of --ckpt, and silence the libraries that will load it. Raises Misuse."""
    from vlv.checkpoints.folder import CheckpointError
    from vlv.checkpoints.published import resolve

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    hush()
    try:
        return resolve(name)
    except CheckpointError as error:
        raise Misuse(f"--ckpt: {error}") from error
