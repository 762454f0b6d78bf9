"""Caption more images than one machine can: python -m serve.ray_batch SRC... DST --ckpt DIR

SRC: files, folders, globs, .txt lists and .tar shards as for serve.vllm_caption; folders, globs and shards behind URLs
(s3://, gs://, by fsspec); Parquet files with a column of URLs. DST: a folder, or such a URL. Decoding, encoder and
language model are actors of a Ray cluster (--address; without it, of this machine), as many as their queues ask for.
The same command goes on after any kill: serve/ray/store.py says how. Needs ray[data]; every node needs this package,
DIR and local sources.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from serve.command import engine_arguments, model_arguments, open_model, require_checkpoint
from serve.ray.cluster import cluster_arguments, joined, on_gpu, share, span
from vlv.common.command import Misuse, Parser, debug_argument, positive, run_command, say

if TYPE_CHECKING:
    from serve.ray.stages import StageOptions
    from vlv.model.config import VLVConfig

UNIT = 512  # images
WAVE = 20_000  # units that Ray gets at a time: it keeps a reference to each
BLOCK = 2 << 30  # bytes of a unit that Ray does not split
ROW = 1 << 10  # of these bytes, for an image's index, kind and error


def parser() -> argparse.ArgumentParser:
    """Return the parser. Light: neither torch nor ray is imported for --help."""
    p = Parser(
        prog="python -m serve.ray_batch",
        description="Caption images on a Ray cluster, with progress that survives any kill.\n\n"
        "    python -m serve.ray_batch s3://bucket/photos s3://bucket/captions --ckpt DIR --address auto --llms 1-64",
        epilog="exit codes: 0 every image of this run has a caption, or nothing was left to do; "
        "1 the run failed, or some of its images did (errors/); 2 wrong arguments.",
        parents=[model_arguments(), engine_arguments(), cluster_arguments(), debug_argument()],
    )
    p.add_argument("paths", nargs="+", metavar="SRC", help="images, folders, .tar shards, URLs, or .parquet lists")
    p.add_argument("output", metavar="DST", help="folder or URL of the parts")
    p.add_argument(
        "--format", choices=("parquet", "webdataset"), default="parquet", help="format of the parts (default: parquet)"
    )
    p.add_argument("--unit", type=positive, default=UNIT, metavar="N", help=f"images in a part (default: {UNIT})")
    p.add_argument(
        "--url-column",
        metavar="NAME",
        help="column of .parquet, .jsonl and .csv lists (default: url, path, file_name, image or id)",
    )
    p.add_argument("--raw", action="store_true", help="leave out the published clean-up of captions")
    p.add_argument(
        "--decoders", type=span, default=(1, 16), metavar="A-B", help="fewest and most decoding actors (default: 1-16)"
    )
    p.add_argument(
        "--encoders", type=span, default=(1, 8), metavar="A-B", help="fewest and most encoder actors (default: 1-8)"
    )
    p.add_argument(
        "--llms", type=span, default=(1, 8), metavar="A-B", help="fewest and most language-model actors (default: 1-8)"
    )
    p.add_argument(
        "--encoder-gpu", type=share, default=0.2, metavar="X", help="share of a GPU for each encoder (default: 0.2)"
    )
    p.add_argument(
        "--llm-gpu", type=share, default=0.8, metavar="X", help="share of a GPU for each language model (default: 0.8)"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_batch, parser().parse_args(argv))


def _batch(args: argparse.Namespace) -> int:
    if args.crop == "tiles":
        raise Misuse("--crop tiles: a unit has one caption an image here; use serve.vllm_caption, with --shard")
    require_checkpoint(args.ckpt)

    from serve.core.inputs import LeftOut, expand
    from serve.ray.stages import ENDINGS, StageOptions
    from serve.ray.store import Store, part, plan

    model = open_model(args)
    limit = max_images(model.checkpoint.config)
    if args.unit > limit:
        raise Misuse(f"--unit {args.unit}: with this checkpoint at most {limit} images fit into one block of Ray's")
    store, model_id = Store(args.output), model.engine().options.model_id(model.checkpoint.hash)
    flags = " ".join([model.flags] * bool(model.flags) + ["--raw"] * args.raw)
    terms = {"sources": sorted(args.paths), "unit": args.unit, "format": args.format, "model": model_id, "flags": flags}
    left_out = LeftOut()
    units = plan(store, expand(args.paths, left_out, args.url_column), terms, args.unit)
    if line := str(left_out):
        say(line)
    ending = ENDINGS[args.format]
    done = store.names(ending)
    todo = [unit for unit in range(units) if part(unit, ending) not in done]
    say(f"{units} units of {args.unit} images: {units - len(todo)} are done, {len(todo)} to do")
    if not todo:
        return 0
    start, captions, errors = time.monotonic(), 0, 0
    options = StageOptions(model.options, args.output, args.format, args.raw, flags)
    with joined("data", args.address, args.cpus, args.debug) as data:
        size = model.checkpoint.config.image_size
        for row in _results(data, args, options, size, todo):
            captions, errors = captions + row["captions"], errors + row["errors"]
            rate = (captions + errors) / (time.monotonic() - start)
            say(f"{captions} captions, {errors} errors, {rate:.1f} images a second")
    if errors:
        say(f"{errors} images failed: see {args.output}/errors")
    return 1 if errors else 0


def max_images(config: VLVConfig) -> int:
    """Return how many crops, and how many embeddings in float32, Ray keeps in one block."""
    return BLOCK // (max(3 * config.image_size**2, 4 * config.queries * config.llm_width) + ROW)


def _results(
    data: ModuleType, args: argparse.Namespace, options: StageOptions, size: int, todo: list[int]
) -> Iterator[dict]:
    """Run the stages over units, and yield the counts of each. `size`: pixels of a crop's side."""
    from serve.ray.decode import Decode
    from serve.ray.stages import Encode, Write

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK
    gpus = args.llm_gpu if args.tensor_parallel == 1 else args.tensor_parallel
    stages = (
        (Decode, (args.output, size, args.workers or 1, args.ignore_icc, args.crop, args.fast_jpeg), args.decoders, 0),
        (Encode, (options,), args.encoders, args.encoder_gpu),
        (Write, (options,), args.llms, gpus),
    )
    has_gpus = on_gpu()
    for first in range(0, len(todo), WAVE):
        wave = todo[first : first + WAVE]
        units = data.from_items([{"unit": unit} for unit in wave], override_num_blocks=len(wave))
        for stage, arguments, actors, share_of_gpu in stages:
            units = units.map_batches(
                stage,
                batch_size=None,  # a block is a unit
                fn_constructor_args=arguments,
                compute=data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]),
                num_cpus=1,
                num_gpus=share_of_gpu if has_gpus else 0,
            )
        yield from units.iter_rows()


if __name__ == "__main__":
    sys.exit(main())
