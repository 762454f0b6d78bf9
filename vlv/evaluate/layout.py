"""Where things are: boxes read from embeddings and from captions, against the boxes that are known.

    python -m vlv.evaluate layout --ckpt assets/vlv-tiny -o layout.json
    python -m vlv.evaluate layout --boxes boxes.json --captions ours=captions.jsonl --url URL --model NAME -o out.json

The first trains a small probe on embeddings of synthetic scenes, whose boxes are exact, and reads places and sizes out
of the checkpoint's captions. The second is for photographs: a language model reads the boxes out of the captions alone;
boxes.json is {"photo.jpg": [{"label": "cat", "box": [x, y, width, height]}, ...]}, in shares of the image's sides.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, positive, run_command
from vlv.common.openai_config import ClientConfig, add_journal_flags, journal_file
from vlv.evaluate.results import evaluation_parser, named_path, results_head, write_results


def parser() -> Parser:
    p = evaluation_parser("layout", __doc__)
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint whose embeddings of synthetic scenes are probed")
    p.add_argument("--train", type=positive, default=4000, help="scenes that the probe learns from (default: 4000)")
    p.add_argument("--count", type=positive, default=1000, help="held-out scenes (default: 1000)")
    p.add_argument("--steps", type=positive, default=600, help="training steps of the probe (default: 600)")
    p.add_argument("--batch", type=positive, default=100, help="scenes encoded together (default: 100)")
    p.add_argument("--boxes", type=Path, metavar="JSON", help="known boxes of photographs")
    p.add_argument("--captions", type=named_path, nargs="+", metavar="NAME=FILE", help="captions of these photographs")
    add_journal_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda args: _evaluate(args, argv), parser().parse_args(argv))


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    if bool(args.ckpt) == bool(args.boxes):
        raise Misuse("give either --ckpt (synthetic scenes) or --boxes with --captions (photographs)")
    if args.boxes:
        return _photographs(args, argv)

    from vlv.checkpoints.published import resolve
    from vlv.evaluate.synthetic.layout import evaluate

    found = evaluate(resolve(args.ckpt), args.train, args.count, args.steps, args.batch)
    write_results(results_head("layout", argv) | found, args.out)
    return 0


def _photographs(args: argparse.Namespace, argv: list[str] | None) -> int:
    if not args.captions:
        raise Misuse("--boxes needs --captions NAME=FILE ..., which the boxes are read from")
    config, journal = ClientConfig.of(vars(args)), journal_file(vars(args))

    from vlv.common.openai_client import JournaledClient
    from vlv.evaluate import caption_files
    from vlv.evaluate.judges.boxes import box_questions, evaluate, read_boxes

    systems = {name: caption_files.read(path) for name, path in args.captions}
    questions = box_questions(read_boxes(args.boxes), systems)
    client = JournaledClient(config, journal)
    estimate = client.estimate(questions.all)
    if args.estimate:
        return 0
    found = evaluate(client, questions)
    head = results_head("layout", argv) | {"photographs": len(questions.known), "estimate": estimate}
    write_results(head | found, args.out)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
