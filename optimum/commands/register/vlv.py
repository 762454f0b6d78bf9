"""`optimum-cli export vlv`: the command of export.onnx as a subcommand of Hugging Face's optimum.

optimum finds this file by its place in the namespace package `optimum.commands.register`, which therefore has no
__init__.py. Of optimum's input generators and normalized configs none is used, because of our graphs' inputs they know
the timestep alone, and as a scalar: they have no type for 8-bit pictures, no name for a cross-attention's keys and
values, and draw random numbers, where an export here is checked on pictures (export/verification/inputs.py).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from export import cli, onnx


class VLVExportCommand(BaseOptimumCLICommand):
    """Export a VLV checkpoint to verified ONNX graphs."""

    COMMAND = CommandInfo(name="vlv", help="Export a VLV checkpoint to verified ONNX graphs.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        cli.debug_argument(parser)
        onnx.add_arguments(parser)

    def run(self) -> None:
        sys.exit(onnx.run(self.args))


REGISTER_COMMANDS = [(VLVExportCommand, ExportCommand)]
