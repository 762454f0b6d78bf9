"""Text-only VQA: a language model answers the questions of VQAv2 or OK-VQA from captions alone."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from vlv.common.openai_client import JournaledClient, Question
from vlv.evaluate import caption_files
from vlv.evaluate.judges.answers import short_answer
from vlv.evaluate.metrics.statistics import bootstrap
from vlv.evaluate.metrics.vqa_accuracy import accuracy
from vlv.evaluate.results import EvaluationError

SYSTEM = """\
You answer questions about a picture that you cannot see, from a description of it. Answer with one word or a very
short phrase, without a sentence around it. Where the description does not tell, give the likeliest answer."""


@dataclass(frozen=True)
class Item:
    """A question of the data set; `answers` are the ten people's, `kind` is yes/no, number or other."""

    id: int
    image: int
    question: str
    answers: tuple[str, ...]
    kind: str


def load_items(questions: Path, annotations: Path) -> list[Item]:
    """Read questions and answers from the official files; ids may be texts. Raises OSError, EvaluationError."""
    try:
        asked = {str(q["question_id"]): q for q in json.loads(caption_files.read_text(questions))["questions"]}
        found = [
            Item(
                a["question_id"],
                int(a["image_id"]),
                asked[str(a["question_id"])]["question"],
                tuple(str(x["answer"]) for x in a["answers"]),
                a.get("answer_type", "other"),
            )
            for a in json.loads(caption_files.read_text(annotations))["annotations"]
        ]
    except EvaluationError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{questions} and {annotations} are no pair of official VQA files: {error!r}") from error
    if not found:
        raise EvaluationError(f"{annotations} has no annotations")
    for item in found:
        if not item.answers:
            raise EvaluationError(f"{annotations}: question {item.id} has no answers: it cannot be graded")
    if len({str(item.id) for item in found}) < len(found):
        raise EvaluationError(f"{annotations} has two annotations of one question")
    return found


def captions_by_number(path: Path) -> dict[int, str]:
    """Read captions by COCO's image id, the number at the end of the file name (COCO_val2014_000000000042.jpg)."""
    return caption_files.by_number(caption_files.read(path))


@dataclass(frozen=True)
class Examples:
    """Training questions that every system has captions for, and those captions by system and image."""

    items: list[Item]
    captions: dict[str, dict[int, str]]

    @classmethod
    def of(cls, items: list[Item], captions: dict[str, dict[int, str]], shots: int) -> Examples:
        """Take the items that all systems have captions for. Raises EvaluationError if too few for `shots`."""
        found = cls([i for i in items if all(i.image in texts for texts in captions.values())], captions)
        if len(found.items) < shots + max(found.per_image.values(), default=0):
            raise EvaluationError(f"{len(found.items)} training questions have captions: too few for {shots} shots")
        return found

    @functools.cached_property
    def per_image(self) -> Counter:
        return Counter(i.image for i in self.items)

    def draw(self, item: Item, shots: int, seed: int) -> list[Item]:
        """Return `shots` examples, none of the item's image; the same for every system."""
        spare = shots + self.per_image[item.image]
        chosen = random.Random(f"{seed}/{item.id}").sample(self.items, spare)
        return [c for c in chosen if c.image != item.image][:shots]


@dataclass(frozen=True)
class VqaQuestions:
    """The questions by system and number of shots, each list in the order of `items`.

    `covered`: the number of the data set's items that every system has a caption for, before the limit.
    """

    items: list[Item]
    covered: int
    parts: dict[tuple[str, int], list[Question]]

    @property
    def all(self) -> list[Question]:
        return [q for part in self.parts.values() for q in part]


def plan(
    items: list[Item],
    systems: dict[str, dict[int, str]],
    examples: Examples,
    shots: list[int],
    limit: int | None = None,
    seed: int = 0,
) -> VqaQuestions:
    """Make the questions for the items that every system has a caption for. Raises EvaluationError without any."""
    chosen = covered = [i for i in items if all(i.image in s for s in systems.values())]
    if not covered:
        raise EvaluationError("no question's image has a caption: image ids are read from the end of the file names")
    if limit and limit < len(covered):
        chosen = random.Random(seed).sample(covered, limit)
    parts = {
        (name, n): [ask(i, name, captions, examples, n, seed) for i in chosen]
        for name, captions in systems.items()
        for n in shots
    }
    return VqaQuestions(chosen, len(covered), parts)


def evaluate(client: JournaledClient, questions: VqaQuestions) -> dict:
    """Ask the questions; return `rows` of accuracies, `usage` and `failures`. Raises ServerError.

    Answers and the people's answers are compared in lower case; then the official rules apply.
    """
    rows, failures = [], {}
    for (name, shots), part in questions.parts.items():
        answers, failed = client.ask(part, parse_answer)
        failures |= failed
        scores = [
            (i, accuracy(answers.get(q.name, ""), [a.lower() for a in i.answers]))
            for i, q in zip(questions.items, part, strict=True)
        ]
        rows.append({"system": name, "shots": shots} | summary(scores))
    return {"rows": rows, "usage": client.usage(questions.all), "failures": failures}


def ask(item: Item, system: str, captions: dict[int, str], examples: Examples, shots: int, seed: int) -> Question:
    """Make the question with its description, after `shots` answered ones."""
    parts = []
    for shown in examples.draw(item, shots, seed) if shots else []:
        answer = Counter(shown.answers).most_common(1)[0][0]
        description = examples.captions[system][shown.image]
        parts.append(f"Description: {description}\nQuestion: {shown.question}\nAnswer: {answer}")
    parts.append(f"Description: {captions[item.image]}\nQuestion: {item.question}\nAnswer:")
    return Question(f"{system}/{shots}/{item.id}", "\n\n".join(parts), SYSTEM, 16)


def parse_answer(answer: str) -> str:
    """Return the plain answer (`short_answer`). Raises ValueError without any."""
    plain = short_answer(answer)
    if not plain:
        raise ValueError("Answer with one word or a short phrase")
    return plain


def summary(scores: list[tuple[Item, float]]) -> dict:
    """Return the mean accuracy in percent with its interval, and by kind of answer."""
    kinds = defaultdict(list)
    for item, score in scores:
        kinds[item.kind].append(100 * score)
    return {
        "accuracy": bootstrap([100 * score for _, score in scores]),
        "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())},
    }
