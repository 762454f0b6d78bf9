"""Run a command: refuse bad arguments, turn errors into one sentence, choose the exit code. Imports nothing heavy.

A command file is thin: a parser, and one call into a library that takes typed arguments.

    def parser() -> Parser:
        return Parser(prog="python -m vlv.x", description=__doc__)
    def main(argv=None) -> int:
        return run_command(work, parser().parse_args(argv))      # work(args) -> exit code or None

| exit code | meaning                                               |
|-----------|-------------------------------------------------------|
| 0         | done                                                  |
| 1         | it failed, or some of its inputs did                  |
| 2         | wrong arguments (`Misuse`)                            |
| 130       | stopped by Ctrl-C; what was written is kept           |
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130
MANY = 12  # options, of which a usage line would need many lines
EXIT_CODES = "exit codes: 0 done; 1 it failed, or some of its inputs did; 2 wrong arguments; 130 stopped by Ctrl-C."

INSTALL = {
    "torchmetrics": "pip install --no-deps torchmetrics lightning-utilities",
    "pycocoevalcap": "pip install --no-deps pycocoevalcap",
    "ray": 'pip install "ray[data,serve]"',
    "onnxruntime": "pip install onnx onnxscript onnxruntime",
    "gguf": "pip install gguf",
    "xllamacpp": "pip install --no-deps xllamacpp==2026.10.11549",
    "vllm": "pip install vllm, or without a GPU: pip install --no-deps -r requirements/cpu.lock",
}  # --no-deps where the dependencies would bring another build of torch


class UserError(Exception):
    """An error whose message is written for the user: the value, what was expected, the remedy."""

    exit_code = FAILED


class Misuse(UserError, ValueError):
    """Raised for arguments that cannot be used."""

    exit_code = MISUSED


class Parser(argparse.ArgumentParser):
    """Parse arguments; errors are one sentence, and description and epilog keep their line breaks.

    The usage line of a command with many options names the required ones alone.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def format_help(self) -> str:
        """Return the help."""
        for action in self._actions:
            if action.option_strings and action.nargs != 0 and not (action.metavar or action.choices):
                action.metavar = METAVARS.get(action.type, "TEXT")
        if self.usage is None and len(self._actions) > MANY:
            required = [
                f"{a.option_strings[0]} {a.metavar or a.dest.upper()}"
                for a in self._actions
                if a.option_strings and a.required
            ]
            paths = [a for a in self._actions if not a.option_strings]
            names = [f"{a.metavar or a.dest}{' ...' if a.nargs in ('*', '+') else ''}" for a in paths]
            self.usage = " ".join(["%(prog)s", *required, "[options]", *names])
        return super().format_help()

    def error(self, message: str):
        self.exit(MISUSED, f"error: {message} (--help shows the usage)\n")


def positive(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


METAVARS = {int: "N", positive: "N", float: "X", Path: "PATH"}  # in --help, for options that name no other


def debug_argument(shows: str = "tracebacks") -> Parser:
    """Return a parent parser with --debug."""
    p = Parser(add_help=False)
    p.add_argument("--debug", action="store_true", help=f"show {shows}")
    return p


def run_command(
    work: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    interrupted: str = "stopped; what is finished is kept, and the same command continues from there",
) -> int:
    """Return the exit code of `work(args)`; an error becomes one sentence on stderr, or a traceback with --debug."""
    # else transformers warns that torchvision is missing, which nothing here needs, and that breaks a CPU's torch
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # bars of its downloads and loading would fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return work(args) or DONE
    except KeyboardInterrupt:
        say(interrupted)
        return INTERRUPTED
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        code, sentence = explain(error)
        say(f"error: {sentence}")
        return code


def explain(error: Exception) -> tuple[int, str]:
    """Return the exit code and the sentence for an error."""
    if isinstance(error, UserError):
        return error.exit_code, " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        return FAILED, f"{package} is not installed: {INSTALL.get(package, f'pip install {package}')}"
    if isinstance(error, OSError) and error.errno:
        return FAILED, str(error)
    return FAILED, f"{one_line(error)} (unexpected: --debug shows where)"


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def command_line(module: str) -> str:
    """Return the command of this process, for a file that records what made it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def why(error: OSError) -> str:
    """Return the system's reason for an error, without its number and path."""
    return os.strerror(error.errno) if error.errno else str(error)


def one_line(error: BaseException, length: int = 300) -> str:
    """Return an exception's type and message as one line of at most about `length` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[:length] + "…"


def hush() -> None:
    """Silence transformers' warnings about torchvision and its loading bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
