"""Serve captions from a Ray cluster: python -m serve.ray_serve --ckpt DIR --replicas 1-8

The routes of serve.server behind Ray Serve's HTTP proxies, in as many replicas as their requests ask for. Needs
ray[serve]; every node needs this package, DIR and --keys. On a cluster that outlives the command, `serve deploy` takes
`import_path: serve.ray_serve:build`; its `args` are these options without their dashes.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Any

from serve.command import open_model
from serve.ray.cluster import cluster_arguments, joined, on_gpu, share, span
from serve.server import EXIT_CODES, config_from, serving_arguments
from vlv.common.command import Parser, debug_argument, positive, run_command, say

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "vlv"
IN_FLIGHT = 512  # requests that a replica decodes together at most, without --in-flight
QUEUE = 128  # requests that wait at a replica and at a proxy, without --queue


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser. Imports neither torch nor ray."""
    p = Parser(
        prog="python -m serve.ray_serve",
        description="Serve captions of a VLV checkpoint over HTTP from a Ray cluster.\n\n"
        "    python -m serve.ray_serve --ckpt DIR --replicas 2-16 --host 0.0.0.0 --keys keys.json --address auto",
        epilog=EXIT_CODES,
        parents=[
            serving_arguments(),
            cluster_arguments(),
            debug_argument("tracebacks, and the replicas' logs on stderr"),
        ],
    )
    p.add_argument(
        "--replicas", type=span, default=(1, 4), metavar="A-B", help="fewest and most replicas (default: 1-4)"
    )
    p.add_argument(
        "--target",
        type=positive,
        default=64,
        metavar="N",
        help="requests that each replica should have; more of them start another (default: 64)",
    )
    p.add_argument("--gpu", type=share, default=1.0, metavar="X", help="share of a GPU for each replica (default: 1)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(_serve, parser().parse_args(argv), interrupted="stopped")


def build(options: dict[str, Any]) -> Application:
    """Return the application for `serve deploy`, from options such as {"ckpt": "/models/vlv", "replicas": "1-8"}."""
    words = []
    for name, value in options.items():
        flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, list) else [value]
        words += [flag if part is True else f"{flag}={part}" for part in values if part is not False]
    return application(parser().parse_args(words))


def application(args: argparse.Namespace) -> Application:
    """Return the deployment of the replicas."""
    from ray import serve as ray_serve

    from serve.http.routes import ServerConfig
    from serve.ray.replica import Replica, front

    deployment = ray_serve.deployment(ray_serve.ingress(front())(Replica))
    return deployment.options(**scaling(args, on_gpu())).bind(config_from(args, ServerConfig))


def scaling(args: argparse.Namespace, gpus: bool) -> dict[str, Any]:
    """Return a deployment's options for Ray Serve."""
    low, high = args.replicas
    queue = QUEUE if args.queue is None else args.queue
    size = args.tensor_parallel
    return {
        "name": "server",
        "ray_actor_options": {"num_cpus": 1, "num_gpus": (args.gpu if size == 1 else size) if gpus else 0},
        # by the number of requests: a GPU is busy whenever there is any work
        "autoscaling_config": {
            "min_replicas": low,
            "max_replicas": high,
            "target_ongoing_requests": args.target,
            "upscale_delay_s": 10,  # loading takes long enough
        },
        "max_ongoing_requests": (args.in_flight or IN_FLIGHT) + queue,
        "max_queued_requests": queue,  # at a proxy; beyond it, 503
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": args.drain,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _serve(args: argparse.Namespace) -> int:
    from serve.http.auth import read_keys

    # refused here in one sentence, not by every replica
    read_keys(args.keys, args.no_auth, args.host)
    open_model(args).engine()

    def stop(number: int, _) -> None:
        say(f"{signal.Signals(number).name}: no new requests; those that run are finished (at most {args.drain} s)")
        raise KeyboardInterrupt

    with joined("serve", args.address, args.cpus, args.debug) as ray_serve:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        with contextlib.suppress(KeyboardInterrupt):
            ray_serve.start(http_options={"host": args.host, "port": args.port})
            say(f"http://{args.host}:{args.port}: loading the models")
            ray_serve.run(application(args), name=NAME, route_prefix="/")
            say("ready")
            signal.pause()
        with contextlib.suppress(KeyboardInterrupt):  # a second one waits for nothing
            ray_serve.delete(NAME)  # returns when the replicas are drained
            if not args.address:
                ray_serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
