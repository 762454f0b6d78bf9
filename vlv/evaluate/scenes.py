"""Score a checkpoint on held-out scenes: are its captions true, and what do its embeddings hold?

    python -m vlv.evaluate scenes --ckpt assets/vlv-tiny --out benchmarks/scenes.json

Captions are judged claim by claim (`vlv.data.scenes.judge`). Reconstructions of the frozen text-to-image
model are judged by a classifier trained on real scenes; its answers are compared with the objects of
the encoded scene, and with those of another scene (shuffled embeddings: the result of chance).
"""

from __future__ import annotations

import argparse
import sys
import time

from vlv.common.command import Misuse, Parser, positive, run_command
from vlv.evaluate.results import evaluation_parser, results_head, write_results


def parser() -> Parser:
    p = evaluation_parser("scenes", __doc__)
    p.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder")
    p.add_argument("--count", type=positive, default=1000, help="held-out scenes (default: 1000)")
    p.add_argument("--batch", type=positive, default=100, help="scenes captioned together (default: 100)")
    part = p.add_mutually_exclusive_group()
    part.add_argument("--captions-only", action="store_true", help="skip the reconstructions")
    part.add_argument("--reconstructions-only", action="store_true", help="skip the captions (stage-1 folders)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda args: _score(args, argv), parser().parse_args(argv))


def _score(args: argparse.Namespace, argv: list[str] | None) -> int:
    if args.count < 2:
        raise Misuse(f"--count {args.count}: at least 2 scenes, since each is compared with another one's embeddings")

    import torch

    from vlv.checkpoints.published import resolve
    from vlv.data import scene_batches, scenes
    from vlv.diffusion.t2i import T2I
    from vlv.evaluate.synthetic.scenes import score_captions, score_reconstructions
    from vlv.model.captioner import Captioner

    checkpoint = resolve(args.ckpt)
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + args.count)
    held_out, images = [scenes.sample(s) for s in seeds], scene_batches.images(seeds)
    results = results_head("scenes", argv)
    results |= {"model": checkpoint.hash, "scenes": args.count, "torch": torch.__version__}
    start = time.time()
    if not args.reconstructions_only:
        results["captions"] = score_captions(Captioner.load(checkpoint), held_out, images, args.batch)
    if not args.captions_only:
        encoder, t2i = checkpoint.load_encoder(), T2I.load(checkpoint.t2i)
        results["reconstructions"] = score_reconstructions(encoder, t2i, held_out, images, args.batch)
    write_results(results | {"seconds": round(time.time() - start, 1)}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
