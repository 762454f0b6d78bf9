"""Boxes of the objects in synthetic scenes, read from embeddings by a probe and from captions by their wording."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import say
from vlv.data import scene_batches, scenes
from vlv.data.scenes import CANVAS, COLUMNS, KINDS, ROWS, SIZES, Scene
from vlv.evaluate.metrics.boxes import score
from vlv.evaluate.synthetic.box_probe import fit
from vlv.model.captioner import Captioner

FIRST_TRAINING_SCENE = 2**30  # beyond every training pool of the model, below the held-out scenes


def evaluate(checkpoint: Checkpoint, train: int, count: int, steps: int, batch: int) -> dict:
    """Return IoU and centre error on `count` held-out scenes: of the probe, of its controls, and of the captions.

    The probe learns `steps` steps from the embeddings of `train` other scenes; `batch` scenes are encoded together.
    """
    encoder = checkpoint.load_encoder()

    def encode(first: int, number: int) -> tuple[Tensor, list[Scene]]:
        parts = []
        with torch.inference_mode():
            for i in range(first, first + number, batch):
                parts.append(encoder.context(scene_batches.images(range(i, min(i + batch, first + number)))))
        return torch.cat(parts), [scenes.sample(s) for s in range(first, first + number)]

    contexts, training = encode(FIRST_TRAINING_SCENE, train)
    say(f"training the probe on {train:,} scenes")
    boxes, present = true_boxes(training)
    probe = fit(contexts, boxes, present, steps)
    mean = torch.stack([b[p].mean(0) for b, p in zip(boxes.transpose(0, 1), present.transpose(0, 1), strict=True)])
    contexts, held_out = encode(scenes.HELD_OUT, count)
    boxes, present = true_boxes(held_out)
    with torch.inference_mode():
        rows = {
            "probe of the embeddings": score(probe(contexts), boxes=boxes, present=present),
            "the same, other scenes' embeddings": score(probe(contexts.roll(1, 0)), boxes=boxes, present=present),
            "each kind's mean box": score(mean.expand(len(boxes), -1, -1), boxes=boxes, present=present),
        }
    if "caption" in checkpoint.can:
        captioner, texts = Captioner.load(checkpoint), []
        pixels = scene_batches.images(range(scenes.HELD_OUT, scenes.HELD_OUT + count))
        for part in pixels.split(batch):
            texts += captioner.captions(part, max_new_tokens=96)
        rows["places said in the captions"] = score(*boxes_of_captions(texts), boxes=boxes, present=present)
    return {"model": checkpoint.hash, "scenes": count, "train_scenes": train, "rows": rows}


def true_boxes(things: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return the boxes of each kind, float32 [B, kinds, 4], and which are present, bool [B, kinds].

    Boxes are left, top, right, bottom in shares of the side.
    """
    boxes, present = torch.zeros(len(things), len(KINDS), 4), torch.zeros(len(things), len(KINDS), dtype=torch.bool)
    for i, scene in enumerate(things):
        for t in scene.things:
            k = KINDS.index(t.kind)
            boxes[i, k] = torch.tensor([t.x, t.y, t.x + t.side, t.y + t.side]) / CANVAS
            present[i, k] = True
    return boxes, present


def boxes_of_captions(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the boxes that captions of scenes describe, as `true_boxes` does, and which kinds they place.

    A place is a quadrant; a small object is put into its middle, since captions say no more.
    """
    boxes, present = torch.zeros(len(texts), len(KINDS), 4), torch.zeros(len(texts), len(KINDS), dtype=torch.bool)
    place = re.compile(
        rf"\bThe ({'|'.join(KINDS)}) (?:is|sits|is placed) at the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})"
    )
    for i, text in enumerate(texts):
        sizes = {k: s for s, k in re.findall(rf"\b({'|'.join(SIZES)}) ({'|'.join(KINDS)})\b", text)}
        for kind, row, column in place.findall(text):
            k, half = KINDS.index(kind), SIZES[sizes.get(kind, "small")] / CANVAS / 2
            x, y = 0.25 + 0.5 * COLUMNS.index(column), 0.25 + 0.5 * ROWS.index(row)
            boxes[i, k] = torch.tensor([x - half, y - half, x + half, y + half])
            present[i, k] = True
    return boxes, present
