"""Join a Ray cluster: which one, how many actors, and how much of a GPU each takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from vlv.common.command import Misuse, Parser, positive


def cluster_arguments() -> Parser:
    """Return a parent parser for commands that run on a Ray cluster."""
    p = Parser(add_help=False)
    p.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of a Ray cluster; auto: the one of this machine (default: none, a Ray for this run)",
    )
    p.add_argument("--cpus", type=positive, metavar="N", help="without --address: CPUs that Ray may use (default: all)")
    return p


def span(text: str) -> tuple[int, int]:
    """Parse a number of actors, or the smallest and the largest number: 2, or 1-8."""
    low, _, high = text.partition("-")
    if low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low):
        return int(low), int(high or low)
    raise argparse.ArgumentTypeError(f"expected a number of actors such as 2, or a range such as 1-8, got {text!r}")


def share(text: str) -> float:
    """Parse a share of a GPU."""
    try:
        if 0 < (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a share of a GPU above 0 and up to 1, got {text!r}")


@contextmanager
def joined(library: str, address: str | None, cpus: int | None, debug: bool = False) -> Iterator[ModuleType]:
    """Yield the module ray.`library` (data, serve) in a driver of a cluster: at `address`, or local. Raises Misuse."""
    try:
        import ray

        module = import_module(f"ray.{library}")
    except ModuleNotFoundError as error:
        raise Misuse(f'{error.name} is not installed: python -m pip install "ray[{library}]"') from error
    cluster = {"address": address} if address else {"address": "local", "num_cpus": cpus}
    ray.init(**cluster, log_to_driver=debug, logging_level="ERROR")
    try:
        yield module
    finally:
        ray.shutdown()


def on_gpu() -> bool:
    """Return True if the cluster has GPUs."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0
