"""Captions for stage 2, by a vision-language model behind an OpenAI-compatible API (the paper: Gemini 2.0 Flash).

    python -m vlv.train.distill photos/ --url https://HOST/v1 --model NAME -o data.jsonl --license CC-BY-4.0
    python -m vlv.train.stage2 --preset paper-stage2 --data data.jsonl ...

Images: folders, .tar, .parquet, .jsonl, hf:NAME, as vlv.data.sources reads them. Each image is described once:
identical and near-identical ones are left out, and so are images and captions that miss the limits; those go to
data.rejected.jsonl with the reason. Every record has its origin: licence, source, hashes, model, prompt, date.

The same command continues a run that ended in any way; what failed (data.errors.jsonl) is tried again. The key for the
API is read from the environment variable that --key-env names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from vlv.common.command import Parser, debug_argument, run_command, say
from vlv.common.openai_config import ClientConfig, add_flags
from vlv.distill.config import PROMPT, DistillConfig
from vlv.distill.quality import Limits


def parser() -> Parser:
    p = Parser(prog="python -m vlv.train.distill", description=__doc__, parents=[debug_argument()])
    p.add_argument("images", nargs="+", metavar="SRC", help="folders, .tar, .parquet, .jsonl, hf:NAME")
    add_flags(p, required=True, concurrency=16, retries=6, timeout=120.0, image_tokens=1000)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="JSONL", help="file of captions to write")
    p.add_argument(
        "--prompt", default=PROMPT, help="question to the model (default: asks for one paragraph, in detail)"
    )
    p.add_argument("--max-tokens", type=int, default=400, help="most tokens of a caption (default: 400)")
    p.add_argument(
        "--size",
        type=int,
        default=768,
        help="side in pixels of the centre crop that is sent; 0: the whole file (default: 768)",
    )
    p.add_argument("--license", default="unknown", help="licence of images whose row names none (default: unknown)")
    p.add_argument("--source", default="", help="origin of images whose row names none (default: their id)")
    p.add_argument(
        "--near",
        type=int,
        default=3,
        help="an image is a duplicate if at most so many of 64 hash bits differ (default: 3)",
    )
    for f in fields(Limits):
        kind = int if f.type == "int" else float
        p.add_argument(
            "--" + f.name.replace("_", "-"),
            type=kind,
            default=f.default,
            help=f"{f.metadata['help']} (default: {f.default})",
        )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.max_tokens < 1 or not 0 <= args.near < 16:
        p.error("--max-tokens is at least 1, --near is from 0 to 15")
    if args.max_cost is not None and not args.price:
        p.error("--max-cost needs --price IN OUT")
    return run_command(_distill, args)


def _distill(args: argparse.Namespace) -> int:
    from vlv.data.sources import open_sources
    from vlv.distill.distiller import Distiller, estimate

    limits = Limits(**{f.name: getattr(args, f.name) for f in fields(Limits)})
    config = DistillConfig(
        output=args.output,
        prompt=args.prompt,
        max_tokens=args.max_tokens,
        size=args.size,
        license=args.license,
        source=args.source,
        near=args.near,
        limits=limits,
        client=ClientConfig.of(vars(args)),
    )
    distiller = Distiller(open_sources(args.images), config)
    text, dollars = estimate(distiller.left, config)
    say(text)
    if args.max_cost is not None and dollars > args.max_cost:
        say(f"that may be above --max-cost {args.max_cost:g}; the run stops when it is spent")
    tally = asyncio.run(distiller.run())
    if tally.rejected:
        say(f"{tally.rejected} images are left out, for the reasons in {distiller.output.rejected}")
    dollars = config.client.dollars(tally.tokens_in, tally.tokens_out)
    print(json.dumps({**asdict(tally), "dollars": round(dollars, 4), "output": str(args.output)}))
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
