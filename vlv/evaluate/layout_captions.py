"""Boxes that a language model reads out of a photograph's caption alone, against the boxes that are known."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from vlv.common.openai_client import Chat, Question
from vlv.evaluate import caption_files

SYSTEM = """\
From the description of a picture alone, say where the named things are. Answer with one JSON object and no other text:
{"1": [left, top, right, bottom], "2": null, ...} with numbers from 0 to 1 in shares of the picture's width and height,
0, 0 at the top left; null for a thing that the description does not mention."""

Box = tuple[float, float, float, float]  # left, top, right, bottom


def evaluate(args: argparse.Namespace) -> dict | None:
    """IoU and centre error of every system's captions; None where only the estimate was asked for."""
    import torch

    from vlv.evaluate.layout import score

    known = read_boxes(args.boxes)
    systems = {name: caption_files.read(path) for name, path in args.captions}
    keys = caption_files.common(systems, set(known))
    questions = {name: [ask(name, k, texts[k], known[k]) for k in keys] for name, texts in systems.items()}
    model, every = Chat(args), [q for part in questions.values() for q in part]
    estimate = model.estimate(every)
    if args.estimate:
        return None
    rows, failures = {}, {}
    for name, part in questions.items():
        answers, bad = model.ask(part, parse)
        failures |= bad
        # a question that failed places nothing
        found = [answers.get(f"{name}/{k}", {}).get(str(i)) for k in keys for i in range(1, len(known[k]) + 1)]
        boxes = torch.tensor([box for k in keys for _, box in known[k]])
        said = torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in found])
        placed = torch.tensor([box is not None for box in found])
        rows[name] = score(said, placed, boxes=boxes, there=torch.ones_like(placed))
    return {"photographs": len(keys), "rows": rows, "estimate": estimate, "failures": failures} | {
        "usage": model.usage(every)
    }


def read_boxes(path: Path) -> dict[str, list[tuple[str, Box]]]:
    """Labels and boxes by image. Raises OSError, ValueError."""
    try:
        images = {caption_files.key(name): things for name, things in json.loads(path.read_text()).items()}
        found = {}
        for key, things in images.items():
            found[key] = []
            for thing in things:
                x, y, width, height = map(float, thing["box"])
                if not (min(width, height) > 0 and min(x, y) >= 0 and max(x + width, y + height) <= 1.001):
                    raise ValueError(f"{path}: {thing['box']} of {key} is no [x, y, width, height] in shares of 1")
                found[key].append((str(thing["label"]), (x, y, x + width, y + height)))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        wanted = '{"photo.jpg": [{"label": "cat", "box": [x, y, width, height]}, ...]}'
        raise ValueError(f"{path} is no file of boxes, which is {wanted}") from error
    return {key: things for key, things in found.items() if things}


def ask(system: str, key: str, caption: str, things: list[tuple[str, Box]]) -> Question:
    """The question for all things of a picture; of several alike the model is told how many there are."""
    names = "\n".join(f"{i}. {label}" for i, (label, _) in enumerate(things, 1))
    text = f"The description:\n{caption}\n\nThe things:\n{names}"
    return Question(f"{system}/{key}", text, SYSTEM, 20 + 30 * len(things))


def parse(answer: str) -> dict[str, Box | None]:
    """Boxes by the things' numbers. Raises ValueError."""
    problem = ValueError('Answer with one JSON object: {"1": [left, top, right, bottom], "2": null, ...}, from 0 to 1')
    block = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        said = json.loads(block[0]) if block else None
        boxes = {number: None if box is None else tuple(map(float, box)) for number, box in said.items()}
    except (AttributeError, TypeError, ValueError):
        raise problem from None
    for box in boxes.values():
        if box is None:
            continue
        if len(box) != 4 or not all(0 <= v <= 1 for v in box) or box[0] >= box[2] or box[1] >= box[3]:
            raise problem
    return boxes
