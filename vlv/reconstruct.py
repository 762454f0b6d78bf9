"""Reconstruct images from their embeddings alone: how much does the bottleneck carry?

    python -m vlv.reconstruct cat.jpg dog.jpg --ckpt DIR -o out            # out/cat.png, out/dog.png, out/grid.png
    python -m vlv.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --interpolate 7
    python -m vlv.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --mix 0.5
    python -m vlv.reconstruct --captions captions.jsonl --t2i SD_DIR -o out

The frozen text-to-image model takes the encoder's context (50 steps, guidance 2.0, as published).
With --captions it takes captions, as the paper judges them; any diffusers text-to-image folder can be used.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from vlv.common.command import Parser, debug_argument, hush, run_command
from vlv.diffusion.samplers import SAMPLERS


def parser(prog: str = "python -m vlv.reconstruct", doc: str = __doc__) -> Parser:
    """Return the parser of the command line."""
    p = Parser(prog=prog, description=doc, parents=[debug_argument()])
    p.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files, or folders of them")
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--captions", type=Path, metavar="JSONL", help="reconstruct from these captions instead of images")
    p.add_argument("--t2i", type=Path, metavar="DIR", help="diffusers folder to use (default: the checkpoint's)")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("reconstructions"),
        metavar="DIR",
        help="folder to write (default: reconstructions)",
    )
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim", help="default: ddim")
    p.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    p.add_argument(
        "--guidance", type=float, default=2.0, help="classifier-free guidance; 1 turns it off (default: 2.0)"
    )
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the initial noise, the same for every image (default: 0)"
    )
    p.add_argument("--batch", type=int, default=8, help="images reconstructed together (default: 8)")
    p.add_argument(
        "--interpolate",
        type=int,
        metavar="N",
        help="reconstruct N embeddings on the line from the first image's to the second's, both ends included",
    )
    p.add_argument(
        "--mix",
        type=float,
        metavar="SHARE",
        help="join the first SHARE (0 to 1) of the first image's embeddings and the rest of the second's",
    )
    p.add_argument("--device", default="cpu", help="torch device, such as cuda (default: cpu)")
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments and check their combination; exits with code 2 where they do not fit together."""
    args = p.parse_args(argv)
    if bool(args.captions) == bool(args.images):
        p.error("give either images or --captions")
    if not args.ckpt and (args.images or not args.t2i):
        p.error("--ckpt is needed (with --captions, --t2i is enough)")
    if args.interpolate is not None and args.mix is not None:
        p.error("--interpolate and --mix exclude each other")
    if (args.interpolate is not None or args.mix is not None) and len(args.images) != 2:
        p.error(f"--interpolate and --mix take two image files, not {len(args.images)}")
    if args.interpolate is not None and args.interpolate < 2:
        p.error(f"--interpolate {args.interpolate}: expected at least 2, the two ends")
    if args.mix is not None and not 0 <= args.mix <= 1:
        p.error(f"--mix {args.mix}: expected a share from 0 to 1")
    if args.steps < 1 or args.batch < 1:
        p.error(f"--steps {args.steps} --batch {args.batch}: expected at least 1 each")
    if not math.isfinite(args.guidance):
        p.error(f"--guidance {args.guidance}: expected a finite number, such as 2.0")
    if not -(2**63) <= args.seed < 2**64:
        p.error(f"--seed {args.seed}: expected an integer of 64 bits")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_work, parse(parser(), argv))


def _work(args: argparse.Namespace) -> None:
    from vlv.checkpoints.published import resolve
    from vlv.common.device import choose_device
    from vlv.diffusion.reconstruct_files import reconstruct_captions, reconstruct_images
    from vlv.diffusion.reconstruction import TorchReconstructor

    hush()
    device = choose_device(args.device)
    if args.captions:
        folder = args.t2i or resolve(args.ckpt).t2i
        print(reconstruct_captions(args.captions, folder, device, args.output, sampling(args)))
        return
    checkpoint = resolve(args.ckpt)

    def open_reconstructor() -> TorchReconstructor:
        return TorchReconstructor(checkpoint.load_encoder(), args.t2i or checkpoint.t2i, device)

    size, chosen = checkpoint.config.image_size, sampling(args)
    print(reconstruct_images(args.images, size, open_reconstructor, args.output, chosen, args.interpolate, args.mix))


def sampling(args: argparse.Namespace):
    """Return the sampling settings of the parsed arguments."""
    from vlv.diffusion.reconstruct_files import Sampling

    return Sampling(args.steps, args.guidance, args.seed, args.sampler, args.batch)


if __name__ == "__main__":
    sys.exit(main())
