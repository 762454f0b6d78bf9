"""Captions for stage 2, by a vision-language model behind an OpenAI-compatible API (the paper: Gemini 2.0 Flash).

    python -m vlv.train.distill photos/ --url https://HOST/v1 --model NAME -o data.jsonl --license CC-BY-4.0
    python -m vlv.train.stage2 --preset paper-stage2 --data data.jsonl ...

Images: folders, .tar, .parquet, .jsonl, hf:NAME, as vlv.data.sources reads them. Each image is described once:
identical and near-identical ones are left out, and so are images and captions that miss the limits; those go to
data.rejected.jsonl with the reason. Every record has its origin: licence, source, hashes, model, prompt, date.

A run that ends in any way goes on where it was; what failed (data.errors.jsonl) is tried again. The key for the API is
read from the environment variable that --key-env names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from vlv.common.command import Parser, run_command
from vlv.distill.distiller import Distiller, Tally
from vlv.distill.quality import Limits

# asks for what the paper's asks for (appendix A, figure 7), in words of our own
PROMPT = (
    "Describe this image in one paragraph of plain text, in full detail, for someone who has to paint it without "
    "having seen it: the scene and its background; the objects, their number, colours, textures and positions relative "
    "to each other; people and animals with their looks, clothes, expressions, poses and what they do; light and "
    "shadows; style and mood. State only what can be seen. Do not start with a phrase like 'The image shows'."
)


def estimate(rows: int, args: argparse.Namespace) -> tuple[str, float]:
    """What the run may cost at most, before anything is sent; and in dollars."""
    tokens_in, tokens_out = rows * (args.image_tokens + len(args.prompt) // 3), rows * args.max_tokens
    text = (
        f"{rows:,} images: at most {tokens_in / 1e6:.2f} M tokens in (taking {args.image_tokens} an image) "
        f"and {tokens_out / 1e6:.2f} M out"
    )
    dollars = Tally(tokens_in=tokens_in, tokens_out=tokens_out).dollars(args.price)
    return text + (f", ${dollars:,.2f}" if args.price else " (--price IN OUT gives the cost)"), dollars


def arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, Limits]:
    p = Parser(prog="python -m vlv.train.distill", description=__doc__)
    p.add_argument("images", nargs="+", metavar="SRC", help="folders, .tar, .parquet, .jsonl, hf:NAME")
    p.add_argument("--url", required=True, help="base of the API, as in https://HOST/v1")
    p.add_argument("--model", required=True, help="the model's name there")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="JSONL")
    p.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (OPENAI_API_KEY)")
    p.add_argument("--prompt", default=PROMPT, help="what to ask (one paragraph, in detail)")
    p.add_argument("--max-tokens", type=int, default=400, help="of a caption (400)")
    p.add_argument("--size", type=int, default=768, help="side of the centre crop that is sent; 0: the file (768)")
    p.add_argument("--concurrency", type=int, default=16, help="requests at a time (16)")
    p.add_argument("--retries", type=int, default=6, help="of a request, with growing pauses (6)")
    p.add_argument("--timeout", type=float, default=120, help="seconds for a request (120)")
    p.add_argument("--license", default="unknown", help="of images whose row names none")
    p.add_argument("--source", default="", help="origin of images whose row names none (their id)")
    p.add_argument("--near", type=int, default=3, help="bits of 64 in which near-identical images may differ (3)")
    p.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="USD for a million tokens in and out")
    p.add_argument("--image-tokens", type=int, default=1000, help="for the estimate: an image's tokens (1000)")
    p.add_argument("--max-cost", type=float, metavar="USD", help="stop when it is spent")
    for f in fields(Limits):
        kind = int if f.type == "int" else float
        p.add_argument(
            "--" + f.name.replace("_", "-"), type=kind, default=f.default, help=f"{f.metadata['help']} ({f.default})"
        )
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    args = p.parse_args(argv)
    if args.concurrency < 1 or args.max_tokens < 1 or not 0 <= args.near < 16:
        p.error("--concurrency and --max-tokens are at least 1, --near is from 0 to 15")
    if args.max_cost is not None and not args.price:
        p.error("--max-cost needs --price IN OUT")
    return args, Limits(**{f.name: getattr(args, f.name) for f in fields(Limits)})


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args, limits = arguments(argv)
    from vlv.data.sources import need, open_sources

    need("openai", "vlv.train.distill")
    distiller = Distiller(open_sources(args.images), args, limits)
    text, dollars = estimate(max(0, distiller.rows - len(distiller.done)), args)
    print(text, file=sys.stderr, flush=True)
    if args.max_cost is not None and dollars > args.max_cost:
        print(f"that may be over --max-cost {args.max_cost:g}; the run stops when it is spent", file=sys.stderr)
    tally = asyncio.run(distiller.run())
    print(json.dumps({**asdict(tally), "dollars": round(tally.dollars(args.price), 4), "output": str(args.output)}))
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main(), argparse.Namespace(debug="--debug" in sys.argv)))
