"""List the commands of vlv, or run one: python -m vlv [MODULE ...]

`python -m vlv MODULE ...` is `python -m MODULE ...`. Commands of kernels/ need this form where the installed
package comes before ours on sys.path: Hugging Face's library `kernels` would hide them, until vlv is imported
(vlv/__init__.py).
"""

from __future__ import annotations

import argparse
import runpy
import sys

from vlv.common.command import Parser

COMMANDS = {
    "vlv.published": "convert published weights to a checkpoint folder, and back",
    "vlv.checkpoint": "describe a checkpoint folder",
    "vlv.reconstruct": "reconstruct images from their embeddings, or from captions",
    "vlv.scenes": "render held-out synthetic scenes",
    "vlv.train.t2i": "train the small text-to-image model of the synthetic scenes",
    "vlv.train.stage1": "train the encoder through a frozen text-to-image model",
    "vlv.train.stage2": "train encoder and language model to caption",
    "vlv.train.florence": "make an initial encoder from Florence-2 and Stable Diffusion",
    "vlv.train.distill": "caption images with another model, as training data of stage 2",
    "vlv.evaluate": "evaluate captions and reconstructions; lists its own commands",
    "kernels.aot": "compile the Triton kernels ahead of time",
    "kernels.occupancy": "show the registers and occupancy of the compiled kernels",
}


def main() -> None:
    """Run the command named first, with the remaining arguments; without one, list the commands."""
    epilog = "commands:\n" + "\n".join(f"  {name:<18} {about}" for name, about in COMMANDS.items())
    parser = Parser(prog="python -m vlv", description=__doc__, epilog=epilog)
    parser.add_argument("module", nargs="?", choices=COMMANDS, metavar="module", help="the command to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; --help lists them")
    args = parser.parse_args()
    if args.module is None:
        parser.print_help()
        return
    sys.argv[1:] = args.arguments
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
