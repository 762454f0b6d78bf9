"""Caption more images than one machine can: python -m serve.ray_batch SRC... DST --ckpt DIR

SRC: files, folders, globs, .txt lists and .tar shards as for serve.vllm_caption; folders behind URLs (s3://, gs://, by
fsspec); Parquet files with a column of URLs. DST: a folder, or such a URL. Decoding, encoder and language model are
actors of a Ray cluster (--address; without it, of this machine), as many as their queues ask for. The same command goes
on after any kill: serve/ray_store.py says how. Needs ray[data]; every node needs this package, DIR and local sources.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from serve.command import Misuse, Model, Parser, debug_argument, engine_arguments, model_arguments, positive, run, say

UNIT = 512  # images
WAVE = 20_000  # units that Ray is told of at a time: it keeps a reference to each
BLOCK = 2 << 30  # bytes of a unit's crops that Ray must not split


def parser() -> argparse.ArgumentParser:
    """The command line. Light: neither torch nor ray is imported for --help."""
    p = Parser(
        prog="python -m serve.ray_batch",
        description="Caption images on a Ray cluster, with progress that survives any kill.",
        epilog="exit codes: 0 every image has a caption; 1 the run failed, or some images did (errors/); 2 misuse.",
        parents=[model_arguments(in_flight=256), engine_arguments(), debug_argument()],
    )
    p.add_argument("paths", nargs="+", metavar="SRC", help="images, folders, .tar shards, URLs, or .parquet lists")
    p.add_argument("output", metavar="DST", help="folder or URL of the parts")
    p.add_argument("--format", choices=("parquet", "webdataset"), default="parquet", help="what a part is (parquet)")
    p.add_argument("--unit", type=positive, default=UNIT, metavar="N", help=f"images a part ({UNIT})")
    p.add_argument("--url-column", default="url", metavar="NAME", help="column of .parquet lists (url)")
    p.add_argument("--raw", action="store_true", help="captions as the model wrote them, without the clean-up")
    p.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: this machine alone)")
    p.add_argument("--cpus", type=positive, metavar="N", help="without --address: CPUs that Ray counts on")
    p.add_argument("--decoders", type=_range, default=(1, 16), metavar="A-B", help="decoding actors (1-16)")
    p.add_argument("--encoders", type=_range, default=(1, 8), metavar="A-B", help="encoder actors (1-8)")
    p.add_argument("--llms", type=_range, default=(1, 8), metavar="A-B", help="language-model actors (1-8)")
    p.add_argument("--encoder-gpu", type=_share, default=0.2, metavar="X", help="GPU that an encoder takes (0.2)")
    p.add_argument("--llm-gpu", type=_share, default=0.8, metavar="X", help="GPU that a language model takes (0.8)")
    return p


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low):
        return int(low), int(high or low)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of actors, such as 2, nor a range, such as 1-8")


def _share(text: str) -> float:
    try:
        if 0 < (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no share of a GPU above 0, up to 1")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(_batch, parser().parse_args(argv))


def _batch(args: argparse.Namespace) -> int:
    from serve.ray_stages import ENDINGS
    from serve.ray_store import Store, items_of, part, plan

    if not args.ckpt:
        raise Misuse("--ckpt is needed (--help shows the usage)")
    model = Model.of(args)
    store, mark = Store(args.output), model.engine().options.mark(model.checkpoint.hash)
    terms = {"sources": sorted(args.paths), "unit": args.unit, "format": args.format, "model": mark}
    units = plan(store, items_of(args.paths, args.url_column), terms, args.unit)
    ending = ENDINGS[args.format]
    done = store.names(ending)
    todo = [unit for unit in range(units) if part(unit, ending) not in done]
    say(f"{units} units of {args.unit} images: {units - len(todo)} are done, {len(todo)} to do")
    if not todo:
        return 0
    try:
        import ray
    except ModuleNotFoundError as error:
        raise Misuse('ray is not installed: python -m pip install "ray[data]"') from error
    place = {"address": args.address} if args.address else {"address": "local", "num_cpus": args.cpus}
    ray.init(**place, log_to_driver=args.debug, logging_level="ERROR")
    start, captions, errors = time.monotonic(), 0, 0
    try:
        for row in _results(ray, args, todo):
            captions, errors = captions + row["captions"], errors + row["errors"]
            rate = (captions + errors) / (time.monotonic() - start)
            say(f"{captions} captions, {errors} errors, {rate:.1f} images a second")
    finally:
        ray.shutdown()
    if errors:
        say(f"{errors} images failed: see {args.output}/errors")
    return 1 if errors else 0


def _results(ray, args: argparse.Namespace, todo: list[int]) -> Iterator[dict]:
    """Run the stages over units; yields what each unit came to."""
    from serve.ray_stages import Decode, Encode, Write

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0
    size = args.tensor_parallel
    shares = {Encode: args.encoder_gpu, Write: args.llm_gpu if size == 1 else size} if on_gpu else {}
    for first in range(0, len(todo), WAVE):
        wave = todo[first : first + WAVE]
        data = ray.data.from_items([{"unit": unit} for unit in wave], override_num_blocks=len(wave))
        for stage, actors in ((Decode, args.decoders), (Encode, args.encoders), (Write, args.llms)):
            data = data.map_batches(
                stage,
                batch_size=None,  # a block is a unit
                fn_constructor_args=(args,),
                compute=ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]),
                num_cpus=1,
                num_gpus=shares.get(stage, 0),
            )
        yield from data.iter_rows()


if __name__ == "__main__":
    sys.exit(main())
