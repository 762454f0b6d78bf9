"""Captions judged by any OpenAI-compatible model that sees the image.

    python -m vlv.evaluate judge PHOTOS --captions ours=captions.jsonl gpt-4o=gpt4o.jsonl gemini=gemini.json \\
        --url https://HOST/v1 --model NAME --price 2.5 10 -o judged.json --estimate     # what it would cost
    python -m vlv.evaluate judge ... --mode pairs                                       # blind pairs only

rubric: each caption by itself, 0 to 6 for coverage, freedom from hallucination and spatial layout; and one score on the
paper's scale of seven levels (appendix D), which is what its table 2 gives for 200 images of MS-COCO 2014.
pairs: the first file against each other one, blind, every pair in both orders; a verdict that the order changes is a
tie.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, positive, run_command, say
from vlv.common.openai_config import ClientConfig, add_journal_flags, journal_file
from vlv.evaluate.results import evaluation_parser, named_path, results_head, write_results


def parser() -> Parser:
    p = evaluation_parser("judge", __doc__)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    p.add_argument(
        "--captions",
        type=named_path,
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="a name for each system, and its captions; yours first",
    )
    p.add_argument("--mode", choices=["all", "rubric", "pairs"], default="all", help="default: all")
    p.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    add_journal_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda args: _judge(args, argv), parser().parse_args(argv))


def _judge(args: argparse.Namespace, argv: list[str] | None) -> int:
    config, journal = ClientConfig.of(vars(args)), journal_file(vars(args))
    if len(dict(args.captions)) < len(args.captions):
        raise Misuse("two --captions have the same name")
    if args.mode == "pairs" and len(args.captions) < 2:
        raise Misuse("--mode pairs compares: give at least two NAME=FILE")

    from vlv.common.openai_client import JournaledClient
    from vlv.evaluate import caption_files
    from vlv.evaluate.judges.captions import caption_questions, judge_captions

    systems = {name: caption_files.read(path) for name, path in args.captions}
    questions = caption_questions(systems, caption_files.images(args.images), args.mode, args.limit)
    client = JournaledClient(config, journal)
    estimate = client.estimate(questions.all)
    if args.estimate:
        return 0
    found = judge_captions(client, questions)
    write_results(results_head("judge", argv) | {"images": len(questions.keys), "estimate": estimate} | found, args.out)
    if found["failures"]:
        say(f"{len(found['failures'])} of {len(questions.all)} judgements failed (see failures in the results)")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
