"""Questions about pictures, answered from their captions alone: how much does a caption tell?

    python -m vlv.evaluate vqa --captions ours=captions.jsonl gpt-4o=gpt4o.jsonl \\
        --questions v2_OpenEnded_mscoco_val2014_questions.json --annotations v2_mscoco_val2014_annotations.json \\
        --train-questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --train-annotations v2_mscoco_train2014_annotations.json \\
        --train-captions ours=ours-train.jsonl gpt-4o=gpt4o-train.jsonl \\
        --shots 0 4 32 --limit 5000 --url https://HOST/v1 --model NAME -o vqa.json

The files are VQAv2's or OK-VQA's, as published. Examples (--shots) are drawn from the training files, never of the
same image. Figures are the official accuracy, in percent.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from vlv.common import command
from vlv.common import openai_client as chat
from vlv.common.openai_client import Chat, Question
from vlv.evaluate import caption_files, cli
from vlv.evaluate.metrics.statistics import bootstrap
from vlv.evaluate.metrics.vqa_accuracy import accuracy

SYSTEM = """\
You answer questions about a picture that you cannot see, from a description of it. Answer with one word or a very
short phrase, without a sentence around it. Where the description does not tell, give the likeliest answer."""


@dataclass(frozen=True)
class Item:
    """A question of the data set; `answers` are the ten people's."""

    id: int
    image: int
    question: str
    answers: tuple[str, ...]
    kind: str  # yes/no, number, other


def parser() -> cli.Parser:
    p = cli.Parser("vqa", __doc__)
    captions = {"type": cli.named, "nargs": "+", "metavar": "NAME=FILE"}
    p.add_argument("--captions", required=True, help="systems, and their captions of the questions' images", **captions)
    p.add_argument("--questions", type=Path, required=True, metavar="JSON", help="the official questions file")
    p.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="the official annotations file")
    p.add_argument("--train-questions", type=Path, metavar="JSON", help="questions that examples come from")
    p.add_argument("--train-annotations", type=Path, metavar="JSON", help="and their answers")
    p.add_argument("--train-captions", default=[], help="each system's captions of the examples' images", **captions)
    p.add_argument("--shots", type=int, nargs="+", default=[0, 4, 32], metavar="N", help="examples shown (0 4 32)")
    p.add_argument("--limit", type=command.positive, metavar="N", help="only N questions, drawn by --seed")
    p.add_argument("--seed", type=int, default=0, help="of the draws")
    chat.add_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser(), lambda args: _evaluate(args, argv), argv)


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    chat.check(args)
    if min(args.shots) < 0:
        raise cli.Misuse(f"--shots {min(args.shots)}: 0 or more examples")
    items = load(args.questions, args.annotations)
    systems = {name: by_number(path) for name, path in args.captions}
    covered = [i for i in items if all(i.image in s for s in systems.values())]
    if not covered:
        raise ValueError("no question's image has a caption: image ids are read from the end of the file names")
    if args.limit and args.limit < len(covered):
        covered = random.Random(args.seed).sample(covered, args.limit)
    examples = _examples(args, systems)
    questions = {
        (name, shots): [ask(i, name, captions, examples, shots, args.seed) for i in covered]
        for name, captions in systems.items()
        for shots in args.shots
    }
    model, every = Chat(args), [q for part in questions.values() for q in part]
    estimate = model.estimate(every)
    if args.estimate:
        return 0
    results = cli.results("vqa", argv) | {"questions": len(covered), "without_caption": len(items) - len(covered)}
    rows, failures = [], {}
    for (name, shots), part in questions.items():
        answers, bad = model.ask(part, first_line)
        failures |= bad
        scores = [(i, accuracy(answers.get(q.name, ""), list(i.answers))) for i, q in zip(covered, part, strict=True)]
        rows.append({"system": name, "shots": shots} | summary(scores))
    results |= {"estimate": estimate, "rows": rows, "usage": model.usage(every), "failures": failures}
    cli.write(results, args.out)
    return 1 if failures else 0


def load(questions: Path, annotations: Path) -> list[Item]:
    """Questions with their answers, from the official files. Raises OSError, ValueError."""
    try:
        asked = {q["question_id"]: q for q in json.loads(questions.read_text())["questions"]}
        found = [
            Item(
                a["question_id"],
                a["image_id"],
                asked[a["question_id"]]["question"],
                tuple(str(x["answer"]) for x in a["answers"]),
                a.get("answer_type", "other"),
            )
            for a in json.loads(annotations.read_text())["annotations"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{questions} and {annotations} are no pair of official VQA files: {error!r}") from error
    if not found:
        raise ValueError(f"{annotations} has no annotations")
    return found


def by_number(path: Path) -> dict[int, str]:
    """Captions by COCO's image id, the number at the end of the file name (COCO_val2014_000000000042.jpg)."""
    numbers = {}
    for key, text in caption_files.read(path).items():
        if digits := re.search(r"\d+$", key):
            numbers[int(digits[0])] = text
    return numbers


@dataclass(frozen=True)
class Examples:
    """Training questions that every system has captions for, and those captions by system."""

    items: list[Item]
    captions: dict[str, dict[int, str]]

    @functools.cached_property
    def of_image(self) -> Counter:
        return Counter(i.image for i in self.items)

    def draw(self, item: Item, shots: int, seed: int) -> list[Item]:
        """`shots` of them, none of the item's image; the same for every system."""
        spare = shots + self.of_image[item.image]
        chosen = random.Random(f"{seed}/{item.id}").sample(self.items, spare)
        return [c for c in chosen if c.image != item.image][:shots]


def _examples(args: argparse.Namespace, systems: dict) -> Examples:
    if max(args.shots) == 0:
        return Examples([], {})
    captions = {name: by_number(path) for name, path in args.train_captions}
    if not (args.train_questions and args.train_annotations) or set(captions) != set(systems):
        raise cli.Misuse(
            "--shots above 0 needs --train-questions, --train-annotations and --train-captions of every system "
            f"({', '.join(systems)}); --shots 0 needs none"
        )
    train = load(args.train_questions, args.train_annotations)
    examples = Examples([i for i in train if all(i.image in texts for texts in captions.values())], captions)
    most = max(examples.of_image.values(), default=0)
    if len(examples.items) < max(args.shots) + most:
        raise ValueError(f"{len(examples.items)} training questions have captions: too few for {max(args.shots)} shots")
    return examples


def ask(item: Item, system: str, captions: dict[int, str], examples: Examples, shots: int, seed: int) -> Question:
    """The question with its description, after `shots` answered ones."""
    parts = []
    for shown in examples.draw(item, shots, seed) if shots else []:
        answer = Counter(shown.answers).most_common(1)[0][0]
        description = examples.captions[system][shown.image]
        parts.append(f"Description: {description}\nQuestion: {shown.question}\nAnswer: {answer}")
    parts.append(f"Description: {captions[item.image]}\nQuestion: {item.question}\nAnswer:")
    return Question(f"{system}/{shots}/{item.id}", "\n\n".join(parts), SYSTEM, 16)


def first_line(answer: str) -> str:
    """The answer itself. Raises ValueError where there is none."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        raise ValueError("Answer with one word or a short phrase")
    return lines[0].removeprefix("Answer:").strip().rstrip(".")


def summary(scores: list[tuple[Item, float]]) -> dict:
    """Accuracy in percent with its interval, and by kind of answer."""
    kinds = defaultdict(list)
    for item, score in scores:
        kinds[item.kind].append(100 * score)
    return {
        "accuracy": bootstrap([100 * score for _, score in scores]),
        "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())},
    }
