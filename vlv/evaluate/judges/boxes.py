"""Boxes that a language model reads out of a photograph's caption alone, against the boxes that are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vlv.common.openai_client import JournaledClient, Question
from vlv.evaluate import caption_files
from vlv.evaluate.judges.answers import objects
from vlv.evaluate.metrics.boxes import score
from vlv.evaluate.results import EvaluationError

SYSTEM = """\
From the description of a picture alone, say where the named things are. Answer with one JSON object and no other text:
{"1": [left, top, right, bottom], "2": null, ...} with numbers from 0 to 1 in shares of the picture's width and height,
0, 0 at the top left; null for a thing that the description does not mention."""

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class BoxQuestions:
    """Known labels and boxes by image key, and a question an image for each system, in the same order."""

    known: dict[str, list[tuple[str, Box]]]
    parts: dict[str, list[Question]]

    @property
    def all(self) -> list[Question]:
        return [q for part in self.parts.values() for q in part]


def box_questions(known: dict[str, list[tuple[str, Box]]], systems: dict[str, dict[str, str]]) -> BoxQuestions:
    """Make the questions for the images that all systems have captions of. Raises EvaluationError without any."""
    systems = {name: caption_files.match(texts, known) for name, texts in systems.items()}
    keys = caption_files.common(systems, set(known))
    parts = {name: [ask(name, k, texts[k], known[k]) for k in keys] for name, texts in systems.items()}
    return BoxQuestions({k: known[k] for k in keys}, parts)


def evaluate(client: JournaledClient, questions: BoxQuestions) -> dict:
    """Ask the questions; return `rows` with IoU and centre error, `failures` and `usage`. Raises ServerError."""
    rows, failures = {}, {}
    things = [(k, str(i), box) for k, boxes in questions.known.items() for i, (_, box) in enumerate(boxes, 1)]
    for name, part in questions.parts.items():
        answers, failed = client.ask(part, parse)
        failures |= failed
        found = [answers.get(f"{name}/{k}", {}).get(number) for k, number, _ in things]  # a failed question: no box
        predicted = torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in found])
        placed = torch.tensor([box is not None for box in found])
        boxes = torch.tensor([box for *_, box in things])
        rows[name] = score(predicted, placed, boxes=boxes, present=torch.ones_like(placed))
    return {"rows": rows, "failures": failures, "usage": client.usage(questions.all)}


def read_boxes(path: Path) -> dict[str, list[tuple[str, Box]]]:
    """Return labels and boxes by image key. Raises OSError, EvaluationError."""
    try:
        by_key = {caption_files.key(name): things for name, things in json.loads(caption_files.read_text(path)).items()}
        found = {}
        for key, things in by_key.items():
            found[key] = []
            for thing in things:
                x, y, width, height = map(float, thing["box"])
                if not (min(width, height) > 0 and min(x, y) >= 0 and max(x + width, y + height) <= 1.001):
                    raise EvaluationError(f"{path}: {thing['box']} of {key} is no [x, y, width, height] in shares of 1")
                found[key].append((str(thing["label"]), (x, y, x + width, y + height)))
    except EvaluationError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wanted = '{"photo.jpg": [{"label": "cat", "box": [x, y, width, height]}, ...]}'
        raise EvaluationError(f"{path} is no file of boxes, which is {wanted}") from error
    return {key: things for key, things in found.items() if things}


def ask(system: str, key: str, caption: str, things: list[tuple[str, Box]]) -> Question:
    """Make the question for all things of an image, numbered, so that equal labels stay apart."""
    names = "\n".join(f"{i}. {label}" for i, (label, _) in enumerate(things, 1))
    text = f"The description:\n{caption}\n\nThe things:\n{names}"
    return Question(f"{system}/{key}", text, SYSTEM, 20 + 30 * len(things))


def parse(answer: str) -> dict[str, Box | None]:
    """Return boxes by the things' numbers, from the last JSON object with a thing 1. Raises ValueError."""
    problem = ValueError('Answer with one JSON object: {"1": [left, top, right, bottom], "2": null, ...}, from 0 to 1')
    try:
        found = [o for o in objects(answer) if "1" in o][-1]
        boxes = {number: None if box is None else tuple(map(float, box)) for number, box in found.items()}
    except (IndexError, TypeError, ValueError):
        raise problem from None
    for box in boxes.values():
        if box is None:
            continue
        if len(box) != 4 or not all(0 <= v <= 1 for v in box) or box[0] >= box[2] or box[1] >= box[3]:
            raise problem
    return boxes
