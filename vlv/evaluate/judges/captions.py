"""Grade captions by a rubric, and compare two systems' captions in blind pairs; a model that sees the image answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from vlv.common.openai_client import JournaledClient, Question
from vlv.evaluate import caption_files
from vlv.evaluate.judges.answers import find_object, number
from vlv.evaluate.metrics.statistics import bootstrap, wilson

# the three criteria and the seven levels of `score` are the paper's (appendix D), in words of our own
GRADES = ("coverage", "hallucination", "layout", "score")
RUBRIC = """\
You grade descriptions of a picture. Look at the picture first, then grade the description from 0 (worst) to 6 (best):
- coverage: are the picture's important objects, attributes, actions and background described?
- hallucination: is everything that is said really in the picture? 6 means that nothing is invented or wrong.
- layout: are the places of things and their relations to each other described, and correctly?
A wrong or invented relation, or a definite one where the picture leaves it open, counts as a hallucination; a plain
relation left out counts as missing coverage. Length earns nothing by itself. Then give the whole description a score:
6: covers everything, layout right, no hallucination
5: nearly everything, layout right, no hallucination, small things missing
4: covers a fair part, layout right, no hallucination, several things missing
3: covers little, hardly any layout, no hallucination
2: covers much, but has a hallucination
1: covers little, and has a hallucination
0: tells nothing of use, or has several hallucinations
Answer with one JSON object and no other text:
{"coverage": N, "hallucination": N, "layout": N, "score": N}"""
PAIR = """\
You compare two descriptions of a picture. Look at the picture first. The better one covers more of what matters,
invents less, and places things more correctly; neither length nor order counts.
Answer with one JSON object and no other text: {"better": 1}, {"better": 2}, or {"better": 0} if they are equal."""


@dataclass(frozen=True)
class CaptionQuestions:
    """The questions about all systems' captions of the same images; the pairs by the name of the other system."""

    systems: tuple[str, ...]
    keys: list[str]
    rubric: list[Question]
    pairs: dict[str, list[Question]]

    @property
    def all(self) -> list[Question]:
        return self.rubric + [q for questions in self.pairs.values() for q in questions]


def caption_questions(
    systems: dict[str, dict[str, str]], files: dict[str, Path], mode: str = "all", limit: int | None = None
) -> CaptionQuestions:
    """Make the questions about the images that all systems have captions of.

    `systems`: captions by image key, yours first; `files`: images by key; `mode`: all, rubric or pairs.
    Raises EvaluationError where the systems have no image in common.
    """
    systems = {name: caption_files.match(texts, files) for name, texts in systems.items()}
    keys = caption_files.common(systems, set(files))[:limit]
    ours, *others = systems
    rubric = [] if mode == "pairs" else rubric_questions(systems, files, keys)
    compared = [] if mode == "rubric" else others
    pairs = {o: pair_questions(systems[ours], systems[o], o, files, keys) for o in compared}
    return CaptionQuestions(tuple(systems), keys, rubric, pairs)


def judge_captions(client: JournaledClient, questions: CaptionQuestions) -> dict:
    """Ask the questions; return `rubric` by system, `pairs`, `usage` and `failures`. Raises ServerError."""
    found: dict = {}
    failures: dict[str, str] = {}
    if questions.rubric:
        grades, failed = client.ask(questions.rubric, parse_rubric)
        failures |= failed
        found["rubric"] = {name: grade(name, grades) for name in questions.systems}
    for other, pairs in questions.pairs.items():
        verdicts, failed = client.ask(pairs, parse_pair)
        failures |= failed
        found.setdefault("pairs", {})[f"{questions.systems[0]} against {other}"] = compare(
            verdicts, other, questions.keys
        )
    return found | {"usage": client.usage(questions.all), "failures": failures}


def rubric_questions(systems: dict[str, dict[str, str]], files: dict[str, Path], keys: list[str]) -> list[Question]:
    """Make a question for each caption."""
    return [
        Question(f"{name}/{k}", f"The description:\n{systems[name][k]}", RUBRIC, 80, files[k])
        for name, k in product(systems, keys)
    ]


def pair_questions(ours: dict, theirs: dict, other: str, files: dict[str, Path], keys: list[str]) -> list[Question]:
    """Make two questions for each pair: ours first, and ours second."""
    return [
        Question(f"{other}/{k}/{order}", f"Description 1:\n{a}\n\nDescription 2:\n{b}", PAIR, 30, files[k])
        for k in keys
        for order, (a, b) in enumerate([(ours[k], theirs[k]), (theirs[k], ours[k])], 1)
    ]


def parse_rubric(answer: str) -> dict[str, float]:
    """Return the grades of an answer. Raises ValueError."""
    # "5/6" is 5 of 6
    found = find_object(re.sub(r"(\d+(?:\.\d+)?)\s*/\s*6\b", r"\1", answer), GRADES)
    grades = {name: number(found.get(name)) for name in GRADES}
    if not all(g is not None and 0 <= g <= 6 for g in grades.values()):
        raise ValueError(
            'Answer with one JSON object like {"coverage": 4, "hallucination": 5, "layout": 3, "score": 2}, from 0 to 6'
        )
    return grades


def parse_pair(answer: str) -> int:
    """Return 0, 1 or 2: equal, or the better description. Raises ValueError."""
    better = number(find_object(answer, ("better",)).get("better"))
    if better not in (0, 1, 2):
        raise ValueError('Answer with one JSON object: {"better": 1}, {"better": 2} or {"better": 0}')
    return better


def grade(system: str, grades: dict[str, dict[str, float]]) -> dict:
    """Return the means of a system's grades, with their intervals over images."""
    own = [g for name, g in grades.items() if name.rpartition("/")[0] == system]
    if not own:
        return {"n": 0}
    return {name: bootstrap([g[name] for g in own]) for name in GRADES}


def compare(verdicts: dict[str, int], other: str, keys: list[str]) -> dict:
    """Count wins, losses and ties of the first system by image, and how often the order decides.

    `verdicts`: by "other/key/order". win_rate: ties count half, interval by bootstrap over images; decided: wins
    without ties, Wilson's interval.
    """
    scores, flipped, first = [], 0, []
    for key in keys:
        straight, swapped = (verdicts.get(f"{other}/{key}/{order}") for order in (1, 2))
        if straight is None or swapped is None:
            continue
        first += [v == 1 for v in (straight, swapped) if v]
        ours = [{0: 0.5, 1: 1.0, 2: 0.0}[straight], {0: 0.5, 1: 0.0, 2: 1.0}[swapped]]
        flipped += set(ours) == {0.0, 1.0}
        # a preference counts only if it is the same in both orders
        scores.append(ours[0] if ours[0] == ours[1] else 0.5)
    if not scores:
        return {"n": 0}
    wins, losses = scores.count(1.0), scores.count(0.0)
    return {
        "n": len(scores),
        "wins": wins,
        "losses": losses,
        "ties": len(scores) - wins - losses,
        "flipped_with_order": flipped,
        "first_preferred": sum(first) / len(first) if first else None,
        "win_rate": bootstrap(scores),
        "decided": wilson(wins, wins + losses),
    }
