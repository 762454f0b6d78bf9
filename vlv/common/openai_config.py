"""Describe an OpenAI-compatible server and how it is asked, and add the flags for it to a command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from vlv.common.command import Misuse, positive


@dataclass(frozen=True)
class ClientConfig:
    """The server, and how it is asked."""

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"  # environment variable with the API key
    concurrency: int = 8
    retries: int = 5
    timeout: float = 300.0  # seconds
    price: tuple[float, float] | None = None  # dollars for a million tokens in and out
    image_tokens: int = 800  # of an image, for the estimate
    max_cost: float | None = None  # dollars
    reasoning: bool = False

    @classmethod
    def of(cls, options: Mapping[str, object]) -> ClientConfig:
        """Make a config of the values of `add_flags`. Raises Misuse for --max-cost without --price."""
        config = cls(**{f.name: options[f.name] for f in fields(cls)})
        if config.max_cost is not None and not config.price:
            raise Misuse("--max-cost needs --price IN OUT, in dollars for a million tokens")
        return config

    def dollars(self, tokens_in: int, tokens_out: int) -> float:
        """Return the price of these tokens; 0 without a price."""
        return (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6 if self.price else 0.0


def add_flags(p: argparse.ArgumentParser, required: bool, **defaults: object) -> None:
    """Add the flags of ClientConfig to a parser; `defaults` replace the values that its fields have."""
    default = {f.name: f.default for f in fields(ClientConfig)} | defaults

    def add(name: str, text: str, **options: object) -> None:
        value = default[name]
        p.add_argument(
            f"--{name.replace('_', '-')}",
            help=f"{text} (default: {value})" if value else text,
            default=value,
            **options,
        )

    p.add_argument("--url", metavar="URL", required=required, help="server, such as http://127.0.0.1:8000/v1")
    p.add_argument("--model", metavar="NAME", required=required, help="the model's name there")
    add("key_env", "environment variable with the API key", metavar="VAR")
    add("concurrency", "questions sent at a time", type=positive)
    add("retries", "times that a question is sent again, with growing pauses", type=int)
    add("timeout", "seconds for a request", type=float)
    add(
        "price",
        "dollars for a million tokens in and for a million out; needed to compute the cost",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
    )
    add("image_tokens", "tokens that an image is assumed to take, for the estimate", type=positive)
    add("max_cost", "do not start, or stop, if the cost in dollars is higher; needs --price", type=float, metavar="USD")
    p.add_argument(
        "--reasoning", action="store_true", help="a model that thinks first: max_completion_tokens, no temperature"
    )


def add_journal_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of ClientConfig and those of a journal of answers; `journal_file` reads them."""
    add_flags(p, required=False)
    p.add_argument("--journal", type=Path, metavar="JSONL", help="file that keeps the answers (default: beside -o)")
    p.add_argument("--estimate", action="store_true", help="print what it would cost, and stop")


def journal_file(options: Mapping[str, object]) -> Path:
    """Return the path of the journal. Raises Misuse where the flags name no server, or no file to keep answers in."""
    url, model, out, journal, estimate = (options[name] for name in ("url", "model", "out", "journal", "estimate"))
    if not model or not (url or estimate):
        raise Misuse("--url and --model are needed: the server that answers, and its model's name")
    if not (journal or out or estimate):
        raise Misuse("-o or --journal is needed: answers are kept, so that none is paid for twice")
    return journal or (out or Path("estimate")).with_suffix(".journal.jsonl")
