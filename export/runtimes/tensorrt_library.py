"""Load TensorRT or TensorRT-RTX, whose Python interfaces are the same from version 11 on.

`rtx` builds without a GPU and compiles its kernels when an engine first runs; `trt` builds on the GPU that the engine
is for. Both are strongly typed: an engine computes in the precision of its graph.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from export.runtimes.base import RuntimeUnavailable


@dataclass(frozen=True)
class Library:
    """One of the two libraries."""

    runtime: str
    modules: tuple[str, ...]  # import names, the usual one first
    title: str
    install: str

    def load(self) -> ModuleType:
        """Import the module. Raises RuntimeUnavailable with the reason and the install command."""
        reason = "it is not installed"
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    reason = str(error)
            except (ImportError, OSError) as error:  # bindings without their library
                reason = str(error)
        raise RuntimeUnavailable(f"{self.title} cannot be loaded ({reason}): {self.install}")

    @property
    def builder(self) -> str:
        """Return name and version, as the manifest keeps them. Raises RuntimeUnavailable."""
        return f"{self.title} {self.load().__version__}"


LIBRARIES = {
    "rtx": Library(
        "rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "TensorRT-RTX",
        "python -m pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
    "trt": Library(
        "trt", ("tensorrt", "tensorrt_bindings"), "TensorRT",
        "python -m pip install --no-deps tensorrt-cu13-libs tensorrt-cu13-bindings",
    ),
}  # fmt: skip


class Log:
    """Collect the errors that TensorRT logs, for the message of a failure."""

    def __init__(self, trt: ModuleType):
        self.errors: list[str] = []
        levels = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

        def log(_, severity, message: str) -> None:
            if severity in levels:
                self.errors.append(message.strip())

        # the base class belongs to the library that was chosen
        self.logger = type("Logger", (trt.ILogger,), {"log": log, "__init__": lambda s: trt.ILogger.__init__(s)})()

    def last(self) -> str:
        """Return the last error."""
        return self.errors[-1][:300] if self.errors else "it gives no reason"


def device_target() -> str:
    """Return the compute capability of this machine's first GPU, as "sm90"; "" where there is none."""
    if not torch.cuda.is_available():
        return ""
    return "sm{}{}".format(*torch.cuda.get_device_capability(0))
