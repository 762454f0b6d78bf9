"""Measure what a server sustains: python -m serve.bench PATH... --url http://127.0.0.1:8000 --rates 2,4,8 -o bench.json

Requests arrive by a Poisson process at each offered rate. Written are time to first token (TTFT), time per further
token (TPOT), time between pieces (ITL) and time to the end (e2e), each as p50, p90 and p99; the goodput (answers per
second within the SLO) and the cost of 1,000 captions; as JSON, and as one page. VLV_API_KEY is the server's API key.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vlv.common.command import Parser, command_line, debug_argument, positive, run_command, say


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m serve.bench",
        description="Measure a captioning server under offered load.\n\n"
        "    python -m serve.bench photos/ --url http://127.0.0.1:8000 --rates 2,4,8 --seconds 60 -o bench.json",
        parents=[debug_argument()],
    )
    p.add_argument("paths", nargs="+", metavar="PATH", help="images to ask for: files, folders, globs")
    p.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)")
    p.add_argument(
        "--rates",
        type=_rates,
        default=(1.0, 2.0, 4.0),
        metavar="R,R",
        help="requests a second, one measurement each (default: 1,2,4)",
    )
    p.add_argument(
        "--seconds", type=positive, default=30, metavar="S", help="seconds of arrivals at each rate (default: 30)"
    )
    p.add_argument(
        "--max-tokens", type=positive, default=300, metavar="N", help="longest caption in tokens (default: 300)"
    )
    p.add_argument(
        "--slo-ttft",
        type=float,
        default=1.0,
        metavar="S",
        help="limit for goodput: seconds to the first token (default: 1)",
    )
    p.add_argument(
        "--slo-e2e",
        type=float,
        default=10.0,
        metavar="S",
        help="limit for goodput: seconds to the last token (default: 10)",
    )
    p.add_argument(
        "--price",
        type=float,
        default=0.0,
        metavar="P",
        help="price of the server for an hour; gives the cost of 1,000 captions (default: 0)",
    )
    p.add_argument(
        "--devices",
        type=positive,
        default=1,
        metavar="N",
        help="GPUs of the server; gives tokens a second for each (default: 1)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the arrival times (default: 0)")
    p.add_argument(
        "-o",
        "--output",
        default="out/bench.json",
        metavar="JSON",
        help="figures; the page is NAME.html beside it (default: out/bench.json)",
    )
    return p


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
        if all(0 < rate < 1e6 for rate in rates):
            return rates
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected rates above 0, such as 2,4,8, got {text!r}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(_bench, parser().parse_args(argv), interrupted="stopped")


def _bench(args: argparse.Namespace) -> None:
    import asyncio

    from serve.reports.bench_page import page
    from serve.reports.load_test import LoadConfig, measure
    from serve.server import config_from
    from vlv.common.files import atomic_write, write_json

    args.api_key = os.environ.get("VLV_API_KEY")
    report = {"command": command_line("serve.bench"), **asyncio.run(measure(config_from(args, LoadConfig)))}
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    with atomic_write(output.with_suffix(".html")) as file:
        file.write_text(page(report), encoding="utf-8")
    say(f"written: {output} and {output.with_suffix('.html')}")


if __name__ == "__main__":
    sys.exit(main())
