"""Where things are: boxes read from embeddings and from captions, against the boxes that are known.

    python -m vlv.evaluate layout --ckpt assets/vlv-tiny -o layout.json
    python -m vlv.evaluate layout --boxes boxes.json --captions ours=captions.jsonl --url URL --model NAME -o said.json

The first trains a small probe on embeddings of synthetic scenes, whose boxes are exact, and reads places and sizes out
of the checkpoint's captions. The second is for photographs: a language model reads the boxes out of the captions alone
(vlv.evaluate.layout_captions); boxes.json is {"photo.jpg": [{"label": "cat", "box": [x, y, width, height]}, ...]}, in
shares of the picture's sides.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.common import command
from vlv.common import openai_client as chat
from vlv.evaluate import cli

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.data.scenes import Scene

PROBE = 2**30  # first scene of the probe's training set: beyond any training pool, below the held-out scenes


def parser() -> cli.Parser:
    p = cli.Parser("layout", __doc__)
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint whose embeddings of synthetic scenes are probed")
    p.add_argument("--train", type=command.positive, default=4000, help="scenes that the probe learns from (4000)")
    p.add_argument("--count", type=command.positive, default=1000, help="held-out scenes (1000)")
    p.add_argument("--steps", type=command.positive, default=600, help="of the probe's training (600)")
    p.add_argument("--batch", type=command.positive, default=100, help="scenes encoded together")
    p.add_argument("--boxes", type=Path, metavar="JSON", help="known boxes of photographs")
    p.add_argument("--captions", type=cli.named, nargs="+", metavar="NAME=FILE", help="captions of these photographs")
    chat.add_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser(), lambda args: _evaluate(args, argv), argv)


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    if bool(args.ckpt) == bool(args.boxes):
        raise cli.Misuse("give either --ckpt (synthetic scenes) or --boxes with --captions (photographs)")
    results = cli.results("layout", argv)
    if args.boxes:
        from vlv.evaluate.layout_captions import evaluate

        if not args.captions:
            raise cli.Misuse("--boxes needs --captions NAME=FILE ..., which the boxes are read from")
        chat.check(args)
        found = evaluate(args)
        if found is None:
            return 0
        cli.write(results | found, args.out)
        return 1 if found["failures"] else 0
    cli.write(results | scenes(args), args.out)
    return 0


def scenes(args: argparse.Namespace) -> dict:
    """IoU and centre error on held-out scenes: of the probe, of its controls, and of the captions."""
    import torch

    from vlv.checkpoints.published import resolve
    from vlv.data import scene_batches as data
    from vlv.data import scenes as world
    from vlv.evaluate.probes.layout import fit
    from vlv.model.captioner import Captioner

    checkpoint = resolve(args.ckpt)
    encoder = checkpoint.load_encoder()

    def encoded(first: int, count: int) -> tuple[Tensor, list[Scene]]:
        things = [world.sample(s) for s in range(first, first + count)]
        parts = []
        with torch.inference_mode():
            for i in range(first, first + count, args.batch):
                parts.append(encoder.context(data.images(range(i, min(i + args.batch, first + count)))))
        return torch.cat(parts), things

    contexts, things = encoded(PROBE, args.train)
    cli.say(f"training the probe on {args.train:,} scenes")
    boxes, there = truth(things)
    probe = fit(contexts, boxes, there, args.steps)
    contexts, held_out = encoded(world.HELD_OUT, args.count)
    boxes, there = truth(held_out)
    mean = torch.stack([b[t].mean(0) for b, t in zip(*(x.transpose(0, 1) for x in truth(things)), strict=True)])
    with torch.inference_mode():
        rows = {
            "probe of the embeddings": score(probe(contexts), boxes=boxes, there=there),
            "the same, other scenes' embeddings": score(probe(contexts.roll(1, 0)), boxes=boxes, there=there),
            "each kind's mean box": score(mean.expand(len(boxes), -1, -1), boxes=boxes, there=there),
        }
    if "caption" in checkpoint.can:
        captioner, texts = Captioner.load(checkpoint), []
        pixels = data.images(range(world.HELD_OUT, world.HELD_OUT + args.count))
        for part in pixels.split(args.batch):
            texts += captioner.captions(part, max_new_tokens=96)
        rows["places said in the captions"] = score(*said(texts), boxes=boxes, there=there)
    return {"model": checkpoint.hash, "scenes": args.count, "train_scenes": args.train, "rows": rows}


def truth(things: list[Scene]) -> tuple[Tensor, Tensor]:
    """Boxes float32 [B, kinds, 4] as left, top, right, bottom in shares of the side, and which are there, bool."""
    import torch

    from vlv.data.scenes import CANVAS, KINDS

    boxes, there = torch.zeros(len(things), len(KINDS), 4), torch.zeros(len(things), len(KINDS), dtype=torch.bool)
    for i, scene in enumerate(things):
        for t in scene.things:
            k = KINDS.index(t.kind)
            boxes[i, k] = torch.tensor([t.x, t.y, t.x + t.side, t.y + t.side]) / CANVAS
            there[i, k] = True
    return boxes, there


def said(texts: list[str]) -> tuple[Tensor, Tensor]:
    """The boxes that captions of scenes tell of, as `truth` gives them, and which kinds they place.

    A place is a quadrant; a small object is put into its middle, since captions say no more.
    """
    import torch

    from vlv.data.scenes import CANVAS, COLUMNS, KINDS, ROWS, SIZES

    boxes, there = torch.zeros(len(texts), len(KINDS), 4), torch.zeros(len(texts), len(KINDS), dtype=torch.bool)
    place = re.compile(
        rf"\bThe ({'|'.join(KINDS)}) (?:is|sits|is placed) at the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})"
    )
    for i, text in enumerate(texts):
        sizes = {k: s for s, k in re.findall(rf"\b({'|'.join(SIZES)}) ({'|'.join(KINDS)})\b", text)}
        for kind, row, column in place.findall(text):
            k, half = KINDS.index(kind), SIZES[sizes.get(kind, "small")] / CANVAS / 2
            x, y = 0.25 + 0.5 * COLUMNS.index(column), 0.25 + 0.5 * ROWS.index(row)
            boxes[i, k] = torch.tensor([x - half, y - half, x + half, y + half])
            there[i, k] = True
    return boxes, there


def score(found: Tensor, placed: Tensor | None = None, *, boxes: Tensor, there: Tensor) -> dict[str, float]:
    """Mean IoU over the objects that are there (0 where one is not placed), and centre error of those placed.

    found, boxes: [B, K, 4]; placed, there: bool [B, K], `placed` None for a box of everything. Errors are in shares
    of the picture's side.
    """
    import torch

    placed = torch.ones_like(there) if placed is None else placed
    corner = torch.minimum(found[..., 2:], boxes[..., 2:]) - torch.maximum(found[..., :2], boxes[..., :2])
    shared = corner.clamp_min(0).prod(-1)
    area = lambda b: (b[..., 2:] - b[..., :2]).clamp_min(0).prod(-1)  # noqa: E731
    iou = shared / (area(found) + area(boxes) - shared).clamp_min(1e-9)
    centre = lambda b: (b[..., :2] + b[..., 2:]) / 2  # noqa: E731
    error = (centre(found) - centre(boxes)).norm(dim=-1)
    both = there & placed
    return {
        "iou": (iou * placed)[there].mean().item(),
        "centre_error": error[both].mean().item() if both.any() else None,
        "placed": both.sum().item() / there.sum().item(),
        "objects": there.sum().item(),
    }
