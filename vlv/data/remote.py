"""Open files by path or URL, with fsspec where it is a URL."""

from __future__ import annotations

import importlib

from vlv.common.command import UserError


class DataError(UserError, ValueError):
    """Raised for training data that cannot be read; the message says which, and what to do."""


def need(package: str, what: str):
    """Import an optional package. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{what} needs a package that is not installed: pip install {package}") from error


def is_url(path: str) -> bool:
    return "://" in path


def open_file(path: str):
    """A seekable binary file, local or remote."""
    return need("fsspec", path).open(path, "rb").open() if is_url(path) else open(path, "rb")
