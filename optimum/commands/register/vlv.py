"""`optimum-cli export vlv`: the command of export.onnx as a subcommand of Hugging Face's optimum.

optimum finds this file by its place in the namespace package `optimum.commands.register`, which therefore has no
__init__.py. None of optimum's input generators and normalized configs is used: of our graphs' inputs they know only the
timestep, and as a scalar. They have no dtype for 8-bit images and no name for a cross-attention's keys and values, and
they draw random numbers, whereas an export is verified on images (export/verification/inputs.py).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from export import onnx
from vlv.common.command import run_command


class VLVExportCommand(BaseOptimumCLICommand):
    """Export a VLV checkpoint to verified ONNX graphs."""

    COMMAND = CommandInfo(name="vlv", help="Export a VLV checkpoint to verified ONNX graphs.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        onnx.add_arguments(parser)

    def run(self) -> None:
        sys.exit(run_command(onnx.run, self.args))


REGISTER_COMMANDS = [(VLVExportCommand, ExportCommand)]
