"""Images generated from embeddings or captions against the originals: FID, KID, CMMD, similarity, LPIPS.

    python -m vlv.evaluate images PHOTOS --ckpt DIR --guidance 1 2 4 --net inception=inception-2015-12-05.pt \\
        --net clip=CLIP_DIR --net dino=DINOV2_DIR --lpips vgg16.safetensors --work drawn -o images.json
    python -m vlv.evaluate images PHOTOS --captions captions.jsonl --t2i SD_DIR --net clip=CLIP_DIR -o captions.json
    python -m vlv.evaluate images PHOTOS --drawn FOLDER --net clip=CLIP_DIR

Every --net NAME=PATH gives, of its features: `frechet` (FID with Inception), `kernel` (KID), `cmmd` (CMMD with CLIP)
and `cosine`. --shuffled adds two controls: the same reconstructions beside other originals (the distances of sets stay
the same, those of pairs do not), and reconstructions from embeddings whose every token is another image's.
Reconstructions are kept in --work; the same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, hush, positive, run_command
from vlv.diffusion.samplers import SAMPLERS
from vlv.evaluate.results import evaluation_parser, named_path, results_head, write_results


def parser() -> Parser:
    p = evaluation_parser("images", __doc__)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="originals: files, or folders of them")
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint whose embeddings are reconstructed")
    p.add_argument("--captions", type=Path, metavar="FILE", help="generate from these captions instead")
    p.add_argument("--drawn", type=Path, metavar="DIR", help="images that exist already, named as the originals")
    p.add_argument(
        "--t2i",
        type=Path,
        metavar="DIR",
        help="text-to-image model, a diffusers folder (default: the checkpoint's t2i/)",
    )
    p.add_argument(
        "--net",
        type=named_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="feature net: a transformers folder or Inception's file (repeatable)",
    )
    p.add_argument("--lpips", type=Path, metavar="FILE", help="VGG16's weights, for LPIPS")
    p.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[2.0],
        metavar="G",
        help="guidance scales to compare (default: 2.0)",
    )
    p.add_argument(
        "--shuffled", action="store_true", help="also measure the two controls, at the first guidance: see above"
    )
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim", help="default: ddim")
    p.add_argument("--steps", type=positive, default=50, help="denoising steps (default: 50)")
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the first image's noise, each next one is 1 higher (default: 0)"
    )
    p.add_argument("--batch", type=positive, default=32, help="images generated together (default: 32)")
    p.add_argument("--limit", type=positive, metavar="N", help="only the first N originals")
    p.add_argument(
        "--work", type=Path, default=Path("drawn"), metavar="DIR", help="folder of the reconstructions (default: drawn)"
    )
    p.add_argument("--device", default="cpu", help="torch device, such as cuda (default: cpu)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda args: _evaluate(args, argv), parser().parse_args(argv))


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    _check(args)

    from vlv.checkpoints.published import resolve
    from vlv.common.device import choose_device
    from vlv.evaluate import caption_files
    from vlv.evaluate.reconstructions.compare import Comparison, sweep
    from vlv.evaluate.reconstructions.generate import FromCaptions, FromImages, Settings

    hush()
    device = str(choose_device(args.device))
    originals = caption_files.images(args.images)
    texts = caption_files.match(caption_files.read(args.captions), originals) if args.captions else None
    if texts:
        originals = {k: originals[k] for k in caption_files.common({str(args.captions): texts}, set(originals))}
    originals = dict(list(originals.items())[: args.limit])
    settings = Settings(args.sampler, args.steps, args.seed, args.batch)
    if args.drawn:
        source = args.drawn
    else:
        checkpoint = resolve(args.ckpt) if args.ckpt else None
        t2i = args.t2i or checkpoint.t2i
        if texts:
            source = FromCaptions(t2i, {k: texts[k] for k in originals}, device, settings, args.work, checkpoint)
        else:
            source = FromImages(t2i, checkpoint, originals, device, settings, args.work)
    comparison = Comparison(list(originals.values()), dict(args.net), args.lpips, args.batch, device)
    head = results_head("images", argv) | {"images": len(originals)}
    found = {}
    for found in sweep(comparison, source, list(originals), args.guidance, args.shuffled):
        write_results(head | found, args.out, show=False)
    write_results(head | found, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    if sum(map(bool, (args.captions, args.drawn))) > 1 or not (args.ckpt or args.drawn or args.captions):
        raise Misuse("give one of --ckpt (its embeddings), --captions with --t2i, or --drawn")
    if args.captions and not (args.t2i or args.ckpt):
        raise Misuse("--captions needs --t2i, the diffusers folder that generates from them (or --ckpt, for its own)")
    if args.shuffled and (args.captions or args.drawn):
        raise Misuse("--shuffled mixes embeddings: it goes with --ckpt alone")
    if not args.net and not args.lpips:
        raise Misuse("give a feature net (--net clip=DIR ...) or --lpips FILE: nothing would be measured")
    if len(dict(args.net)) < len(args.net):
        raise Misuse("two --net have the same name")


if __name__ == "__main__":
    sys.exit(main())
