"""Score a checkpoint on held-out scenes: are its captions true, and do its embeddings carry the picture?

    python -m vlv.evaluate.scenes --ckpt assets/vlv-tiny --out benchmarks/scenes.json

Captions are judged claim by claim (`vlv.scenes.judge`). Reconstructions of the frozen text-to-image
model are judged by a classifier trained on real scenes; its answers are compared with the objects of
the encoded scene, and with those of another scene (shuffled embeddings: what chance gives).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from vlv.train import cli


def score_captions(captioner, scenes: list, images, batch: int) -> dict:
    """Shares of scenes whose greedy, cleaned caption is right in each kind of claim."""
    from vlv.scenes import judge

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


def train_classifier(steps: int = 600, batch: int = 128):
    """A small convolutional network: uint8 [B, 3, 64, 64] -> logits of the kinds present [B, kinds].

    Trained on real scenes, blurred and noised a little so that it reads shapes rather than edges.
    """
    import torch
    from torch import nn
    from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

    from vlv import scenes
    from vlv.train import data

    torch.manual_seed(0)

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    net = nn.Sequential(*layer(3, 32), *layer(32, 64), *layer(64, 128), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
    net.extend([nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(scenes.KINDS))])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        seeds = data.seeds(step, batch, 2**30)
        x = data.images(seeds) / 127.5 - 1
        x = avg_pool2d(x, 3, stride=1, padding=1) if step % 2 else x
        x = x + torch.randn_like(x) * 0.1 * torch.rand(batch, 1, 1, 1)
        loss = binary_cross_entropy_with_logits(net(x), presence([scenes.sample(s) for s in seeds]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def presence(scenes: list):
    """Which kinds each scene shows: float32 [B, kinds] of 0 and 1."""
    import torch

    from vlv.scenes import KINDS

    return torch.tensor([[float(k in s.kinds) for k in KINDS] for s in scenes])


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

    classifier, truth = train_classifier(), presence(scenes)
    pictures = []
    for i in range(0, len(scenes), batch):
        with torch.inference_mode():
            context = encoder.context(images[i : i + batch])
        pictures.append(t2i.reconstruct(context, steps=50, guidance=2.0, seed=0))
        print(f"reconstructed {min(i + batch, len(scenes))}/{len(scenes)}", file=sys.stderr, flush=True)
    pictures = torch.cat(pictures)
    with torch.inference_mode():
        real, seen = classifier(images / 127.5 - 1), classifier(pictures / 127.5 - 1)
    return {
        "objects_named": named(seen, truth),
        "objects_named_shuffled": named(seen, truth.roll(1, 0)),
        "objects_named_in_real_scenes": named(real, truth),
        "pixel_rmse": (pictures / 255 - images / 255).square().mean().sqrt().item(),
        "pixel_rmse_shuffled": (pictures / 255 - images.roll(1, 0) / 255).square().mean().sqrt().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.evaluate.scenes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, help="JSON file of the results (also printed)")
    parser.add_argument("--count", type=int, default=1000, help="held-out scenes (default: 1000)")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--captions-only", action="store_true", help="skip the reconstructions")
    parser.add_argument("--reconstructions-only", action="store_true", help="skip the captions (stage-1 folders)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    if args.count < 2 or args.batch < 1:
        parser.error(f"--count {args.count} --batch {args.batch}: at least 2 scenes and a batch of 1")

    import torch

    from vlv import scenes
    from vlv.captioner import Captioner
    from vlv.diffusion import T2I
    from vlv.published import resolve
    from vlv.train import data

    checkpoint = resolve(args.ckpt)
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + args.count)
    held_out, images = [scenes.sample(s) for s in seeds], data.images(seeds)
    results = {"command": " ".join(["python -m vlv.evaluate.scenes", *sys.argv[1:]])}
    results |= {"model": checkpoint.hash, "scenes": args.count, "torch": torch.__version__}
    start = time.time()
    if not args.reconstructions_only:
        results["captions"] = score_captions(Captioner.load(checkpoint), held_out, images, args.batch)
    if not args.captions_only:
        encoder, t2i = checkpoint.load_encoder(), T2I.load(checkpoint.t2i)
        results["reconstructions"] = score_reconstructions(encoder, t2i, held_out, images, args.batch)
    results["seconds"] = round(time.time() - start, 1)
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    cli.run(main)
