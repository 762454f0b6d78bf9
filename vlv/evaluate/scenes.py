"""Score a checkpoint on held-out scenes: are its captions true, and do its embeddings carry the picture?

    python -m vlv.evaluate scenes --ckpt assets/vlv-tiny --out benchmarks/scenes.json

Captions are judged claim by claim (`vlv.data.scenes.judge`). Reconstructions of the frozen text-to-image
model are judged by a classifier trained on real scenes; its answers are compared with the objects of
the encoded scene, and with those of another scene (shuffled embeddings: what chance gives).
"""

from __future__ import annotations

import argparse
import sys
import time

from vlv.common import command
from vlv.evaluate import cli


def score_captions(captioner, scenes: list, images, batch: int) -> dict:
    """Shares of scenes whose greedy, cleaned caption is right in each kind of claim."""
    from vlv.data.scenes import judge

    verdicts, samples = [], []
    for i in range(0, len(scenes), batch):
        texts = captioner.captions(images[i : i + batch], max_new_tokens=96)
        verdicts += [judge(t, s) for t, s in zip(texts, scenes[i : i + batch], strict=True)]
        samples += texts
    total = len(scenes)
    several = [v for v, s in zip(verdicts, scenes, strict=True) if len(s.things) > 1]
    return {
        "objects": sum(v.objects for v in verdicts) / total,
        "count": sum(v.count for v in verdicts) / total,
        "background": sum(v.background for v in verdicts) / total,
        "sizes": sum(v.sizes for v in verdicts) / total,
        "places": sum(v.places for v in verdicts) / total,
        "relation": sum(v.relations[1] > 0 and v.relations[0] == v.relations[1] for v in several) / len(several),
        "samples": samples[:8],
    }


def classifier():
    """A small untrained convolutional network: float32 [B, 3, 64, 64] -> logits of the kinds present [B, kinds]."""
    from torch import nn

    from vlv.data.scenes import KINDS

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    net = nn.Sequential(*layer(3, 32), *layer(32, 64), *layer(64, 128), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
    return net.extend([nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(KINDS))])


def named(logits, truth) -> float:
    """The share of objects among the classifier's k most likely kinds, k being the scene's true count."""
    hits = 0
    for row, labels in zip(logits, truth, strict=True):
        top = row.topk(int(labels.sum())).indices
        hits += labels[top].sum().item()
    return hits / truth.sum().item()


def score_reconstructions(encoder, t2i, scenes: list, images, batch: int) -> dict:
    """How many objects a classifier finds in the reconstructions; and in those of other scenes' embeddings."""
    import torch

    from vlv.evaluate.scene_net import presence, train

    judge, truth = train(classifier), presence(scenes)
    pictures = []
    for i in range(0, len(scenes), batch):
        with torch.inference_mode():
            context = encoder.context(images[i : i + batch])
        pictures.append(t2i.reconstruct(context, steps=50, guidance=2.0, seed=0))
        print(f"reconstructed {min(i + batch, len(scenes))}/{len(scenes)}", file=sys.stderr, flush=True)
    pictures = torch.cat(pictures)
    with torch.inference_mode():
        real, seen = (judge(x / 127.5 - 1) for x in (images, pictures))
    return {
        "objects_named": named(seen, truth),
        "objects_named_shuffled": named(seen, truth.roll(1, 0)),
        "objects_named_in_real_scenes": named(real, truth),
        "pixel_rmse": (pictures / 255 - images / 255).square().mean().sqrt().item(),
        "pixel_rmse_shuffled": (pictures / 255 - images.roll(1, 0) / 255).square().mean().sqrt().item(),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = cli.Parser("scenes", __doc__)
    p.add_argument("--ckpt", required=True, help="checkpoint folder")
    p.add_argument("--count", type=command.positive, default=1000, help="held-out scenes (default: 1000)")
    p.add_argument("--batch", type=command.positive, default=100)
    part = p.add_mutually_exclusive_group()
    part.add_argument("--captions-only", action="store_true", help="skip the reconstructions")
    part.add_argument("--reconstructions-only", action="store_true", help="skip the captions (stage-1 folders)")
    return cli.run(p, lambda args: _score(args, argv), argv)


def _score(args: argparse.Namespace, argv: list[str] | None) -> int:
    if args.count < 2:
        raise cli.Misuse(f"--count {args.count}: at least 2 scenes, the shuffled embeddings are another one's")

    import torch

    from vlv.checkpoints.published import resolve
    from vlv.data import scene_batches as data
    from vlv.data import scenes
    from vlv.diffusion.t2i import T2I
    from vlv.model.captioner import Captioner

    checkpoint = resolve(args.ckpt)
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + args.count)
    held_out, images = [scenes.sample(s) for s in seeds], data.images(seeds)
    results = cli.results("scenes", argv)
    results |= {"model": checkpoint.hash, "scenes": args.count, "torch": torch.__version__}
    start = time.time()
    if not args.reconstructions_only:
        results["captions"] = score_captions(Captioner.load(checkpoint), held_out, images, args.batch)
    if not args.captions_only:
        encoder, t2i = checkpoint.load_encoder(), T2I.load(checkpoint.t2i)
        results["reconstructions"] = score_reconstructions(encoder, t2i, held_out, images, args.batch)
    cli.write(results | {"seconds": round(time.time() - start, 1)}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
