"""What the commands on Ray share: which cluster, how many actors, and how much of a GPU each takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from serve.command import Misuse, Parser, positive


def cluster_arguments() -> Parser:
    """For whatever runs on a Ray cluster."""
    p = Parser(add_help=False)
    p.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: this machine alone)")
    p.add_argument("--cpus", type=positive, metavar="N", help="without --address: CPUs that Ray counts on")
    return p


def span(text: str) -> tuple[int, int]:
    """An argument that is a number of actors, or the fewest and the most of them: 2, or 1-8."""
    low, _, high = text.partition("-")
    if low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low):
        return int(low), int(high or low)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of actors, such as 2, nor a range, such as 1-8")


def share(text: str) -> float:
    """An argument that is a part of a GPU."""
    try:
        if 0 < (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no share of a GPU above 0, up to 1")


@contextmanager
def joined(args: argparse.Namespace, part: str) -> Iterator[ModuleType]:
    """The module ray.`part` (data, serve), in a driver of the cluster that cluster_arguments name. Raises Misuse."""
    try:
        import ray

        module = import_module(f"ray.{part}")
    except ModuleNotFoundError as error:
        raise Misuse(f'{error.name} is not installed: python -m pip install "ray[{part}]"') from error
    place = {"address": args.address} if args.address else {"address": "local", "num_cpus": args.cpus}
    ray.init(**place, log_to_driver=args.debug, logging_level="ERROR")
    try:
        yield module
    finally:
        ray.shutdown()


def on_gpu() -> bool:
    """Whether the cluster has GPUs."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0
