"""Captions judged by any OpenAI-compatible model that sees the picture.

    python -m vlv.evaluate judge PHOTOS --captions ours=captions.jsonl gpt-4o=gpt4o.jsonl gemini=gemini.json \\
        --url https://HOST/v1 --model NAME --price 2.5 10 -o judged.json --estimate     # what it would cost
    python -m vlv.evaluate judge ... --mode pairs                                       # blind pairs only

rubric: each caption by itself, 0 to 6 for coverage, freedom from hallucination and spatial layout; and one score on the
paper's scale of seven levels (appendix D), which is what its table 2 gives for 200 pictures of MS-COCO 2014.
pairs: the first file against each other one, blind, every pair in both orders; what flips with the order is a tie.
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import product
from pathlib import Path

from vlv.common import command
from vlv.common import openai_client as chat
from vlv.common.openai_client import Chat, Question
from vlv.evaluate import caption_files, cli
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


def parser() -> cli.Parser:
    p = cli.Parser("judge", __doc__)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="the pictures: files, or folders of them")
    p.add_argument(
        "--captions", type=cli.named, nargs="+", required=True, metavar="NAME=FILE", help="systems; yours first"
    )
    p.add_argument("--mode", choices=["all", "rubric", "pairs"], default="all")
    p.add_argument("--limit", type=command.positive, metavar="N", help="only the first N images")
    chat.add_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser(), lambda args: _judge(args, argv), argv)


def _judge(args: argparse.Namespace, argv: list[str] | None) -> int:
    chat.check(args)
    systems = {name: caption_files.read(path) for name, path in args.captions}
    if len(systems) < len(args.captions):
        raise cli.Misuse("two --captions have the same name")
    if args.mode == "pairs" and len(systems) < 2:
        raise cli.Misuse("--mode pairs compares: give at least two NAME=FILE")
    files = caption_files.pictures(args.images)
    keys = caption_files.common(systems, set(files))[: args.limit]
    ours, *others = systems
    rubric = [] if args.mode == "pairs" else rubric_questions(systems, files, keys)
    pairs = (
        {} if args.mode == "rubric" else {o: pair_questions(systems[ours], systems[o], o, files, keys) for o in others}
    )
    judge, every = Chat(args), rubric + [q for questions in pairs.values() for q in questions]
    estimate = judge.estimate(every)
    if args.estimate:
        return 0
    results = cli.results("judge", argv) | {"images": len(keys), "estimate": estimate}
    failures: dict[str, str] = {}
    if rubric:
        grades, bad = judge.ask(rubric, parse_rubric)
        failures |= bad
        results["rubric"] = {name: grade(name, grades) for name in systems}
    for other, questions in pairs.items():
        verdicts, bad = judge.ask(questions, parse_pair)
        failures |= bad
        results.setdefault("pairs", {})[f"{ours} against {other}"] = compare(verdicts, other, keys)
    results |= {"usage": judge.usage(every), "failures": failures}
    cli.write(results, args.out)
    if failures:
        cli.say(f"{len(failures)} of {len(every)} judgements failed (see failures in the results)")
    return 1 if failures else 0


def rubric_questions(systems: dict[str, dict[str, str]], files: dict[str, Path], keys: list[str]) -> list[Question]:
    return [
        Question(f"{name}/{k}", f"The description:\n{systems[name][k]}", RUBRIC, 80, files[k])
        for name, k in product(systems, keys)
    ]


def pair_questions(ours: dict, theirs: dict, other: str, files: dict[str, Path], keys: list[str]) -> list[Question]:
    """Each pair twice: ours first, and ours second."""
    return [
        Question(f"{other}/{k}/{order}", f"Description 1:\n{a}\n\nDescription 2:\n{b}", PAIR, 30, files[k])
        for k in keys
        for order, (a, b) in enumerate([(ours[k], theirs[k]), (theirs[k], ours[k])], 1)
    ]


def _object(answer: str) -> dict:
    """The JSON object in an answer, whatever stands around it."""
    found = re.search(r"\{[^{}]*\}", answer)
    try:
        return json.loads(found[0]) if found else {}
    except json.JSONDecodeError:
        return {}


def parse_rubric(answer: str) -> dict[str, float]:
    """The grades. Raises ValueError."""
    said = _object(answer)
    grades = {name: said.get(name) for name in GRADES}
    if not all(isinstance(g, int | float) and not isinstance(g, bool) and 0 <= g <= 6 for g in grades.values()):
        raise ValueError(
            'Answer with one JSON object like {"coverage": 4, "hallucination": 5, "layout": 3, "score": 2}, from 0 to 6'
        )
    return grades


def parse_pair(answer: str) -> int:
    """0, 1 or 2. Raises ValueError."""
    better = _object(answer).get("better")
    if isinstance(better, bool) or better not in (0, 1, 2):
        raise ValueError('Answer with one JSON object: {"better": 1}, {"better": 2} or {"better": 0}')
    return better


def grade(system: str, grades: dict[str, dict[str, float]]) -> dict:
    """Means of a system's grades, with their intervals over images."""
    mine = [g for name, g in grades.items() if name.rpartition("/")[0] == system]
    if not mine:
        return {"n": 0}
    return {name: bootstrap([g[name] for g in mine]) for name in GRADES}


def compare(verdicts: dict[str, int], other: str, keys: list[str]) -> dict:
    """Wins, losses and ties of the first system, counted by image, and how much the judge goes by the order.

    win_rate: ties count half, interval by bootstrap over images. decided: wins of what was no tie, Wilson's interval.
    """
    scores, flipped, first = [], 0, []
    for key in keys:
        straight, swapped = (verdicts.get(f"{other}/{key}/{order}") for order in (1, 2))
        if straight is None or swapped is None:
            continue
        first += [v == 1 for v in (straight, swapped) if v]
        ours = [{0: 0.5, 1: 1.0, 2: 0.0}[straight], {0: 0.5, 1: 0.0, 2: 1.0}[swapped]]
        flipped += set(ours) == {0.0, 1.0}
        # only a preference that no order takes back counts as one
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
