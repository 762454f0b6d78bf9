"""What the commands of all rooms share: how arguments are refused, and what they say. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import shlex
import sys


class Misuse(ValueError):
    """Arguments that cannot be meant."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, and whose description and epilog keep their lines."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help shows the usage)\n")


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def say(text: str) -> None:
    """One line to stderr."""
    print(text, file=sys.stderr, flush=True)


def command_line(module: str) -> str:
    """What this process was started with, for a file that tells what made it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def why(error: OSError) -> str:
    """What the system says of an error, without its number and the path."""
    return os.strerror(error.errno) if error.errno else str(error)


def one_line(error: BaseException, length: int = 300) -> str:
    """An exception's type and message as one line of at most about `length` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[:length] + "…"


def hush() -> None:
    """Keep transformers' notes on torchvision and its bars of loading off the screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
