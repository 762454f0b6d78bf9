"""Run a command of kernels/ where Hugging Face's library of that name hides it: python -m vlv kernels.aot …

Installed beside that library, outside of a source tree, `python -m kernels.aot` looks for `aot` among its modules. Once
vlv is imported, ours have joined them (vlv/__init__.py).
"""

from __future__ import annotations

import argparse
import runpy
import sys

from vlv.common.command import Parser

COMMANDS = ("kernels.aot", "kernels.occupancy")


def main() -> None:
    """Hand the words behind the module's name to it."""
    parser = Parser(prog="python -m vlv", description=__doc__)
    parser.add_argument("module", choices=COMMANDS, help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own; --help lists them")
    args = parser.parse_args()
    sys.argv[1:] = args.arguments
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
