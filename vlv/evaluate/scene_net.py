"""A feature net of the synthetic world: a small ResNet that names the kinds in a scene, as a transformers folder.

    python -m vlv.evaluate.scene_net runs/scene-net        # a minute on two cores
    python -m vlv.evaluate images SCENES --ckpt assets/vlv-tiny --net scenes=runs/scene-net

Inception, CLIP and DINO are trained on photographs and do not know these emoji; this net does, and is used as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Parser, debug_argument, positive, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = Parser(
        prog="python -m vlv.evaluate.scene_net", description=__doc__.split("\n\n")[0], parents=[debug_argument()]
    )
    p.add_argument("folder", type=Path, help="folder to write")
    p.add_argument("--steps", type=positive, default=600, help="training steps (default: 600)")
    return run_command(_make, p.parse_args(argv))


def _make(args: argparse.Namespace) -> int:
    from vlv.evaluate.synthetic.scene_net import save, train

    args.folder.mkdir(parents=True, exist_ok=True)  # before the training
    save(train(steps=args.steps), args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
