"""Questions about images, answered from their captions alone: how much does a caption tell?

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
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, positive, run_command
from vlv.common.openai_config import ClientConfig, add_journal_flags, journal_file
from vlv.evaluate.results import evaluation_parser, named_path, results_head, write_results


def parser() -> Parser:
    p = evaluation_parser("vqa", __doc__)
    captions = {"type": named_path, "nargs": "+", "metavar": "NAME=FILE"}
    p.add_argument("--captions", required=True, help="systems, and their captions of the questions' images", **captions)
    p.add_argument("--questions", type=Path, required=True, metavar="JSON", help="the official questions file")
    p.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="the official annotations file")
    p.add_argument("--train-questions", type=Path, metavar="JSON", help="questions that examples come from")
    p.add_argument("--train-annotations", type=Path, metavar="JSON", help="their answers")
    p.add_argument("--train-captions", default=[], help="each system's captions of the examples' images", **captions)
    p.add_argument(
        "--shots",
        type=int,
        nargs="+",
        default=[0, 4, 32],
        metavar="N",
        help="numbers of examples shown before the question (default: 0 4 32)",
    )
    p.add_argument("--limit", type=positive, metavar="N", help="only N questions, drawn by --seed")
    p.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    add_journal_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda args: _evaluate(args, argv), parser().parse_args(argv))


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    config, journal = ClientConfig.of(vars(args)), journal_file(vars(args))
    if min(args.shots) < 0:
        raise Misuse(f"--shots {min(args.shots)}: 0 or more examples")
    trained = args.train_questions and args.train_annotations
    if max(args.shots) and not (trained and dict(args.train_captions).keys() == dict(args.captions).keys()):
        raise Misuse(
            "--shots above 0 needs --train-questions, --train-annotations and --train-captions of every system "
            f"({', '.join(dict(args.captions))}); --shots 0 needs none"
        )

    from vlv.common.openai_client import JournaledClient
    from vlv.evaluate.judges.vqa import Examples, captions_by_number, evaluate, load_items, plan

    items = load_items(args.questions, args.annotations)
    systems = {name: captions_by_number(path) for name, path in args.captions}
    examples = Examples([], {})
    if max(args.shots):
        captions = {name: captions_by_number(path) for name, path in args.train_captions}
        examples = Examples.of(load_items(args.train_questions, args.train_annotations), captions, max(args.shots))
    questions = plan(items, systems, examples, args.shots, args.limit, args.seed)
    client = JournaledClient(config, journal)
    estimate = client.estimate(questions.all)
    if args.estimate:
        return 0
    found = evaluate(client, questions)
    head = results_head("vqa", argv) | {"questions": len(questions.items)}
    head |= {"without_caption": len(items) - questions.covered, "estimate": estimate}
    write_results(head | found, args.out)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
