"""Caption image files: python -m serve.vllm_caption PATHS... --ckpt DIR -o captions.jsonl

The record of an image is appended to the output as soon as it is done, so a run that ends early,
however it ends, goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

from serve import FORMATS
from serve.command import Misuse, Model, Parser, debug_argument, engine_arguments, model_arguments, positive, run, say

EXIT_CODES = """\
exit codes: 0 every image of this run has a caption (what earlier runs have finished is not looked at again);
1 the run failed, or some of its images did (see NAME.errors.jsonl); 2 wrong arguments; 130 stopped by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The command line. Light: neither torch nor the pipeline is imported for --help."""
    p = Parser(
        prog="python -m serve.vllm_caption",
        description="Caption images with a VLV checkpoint, through vLLM.",
        epilog=EXIT_CODES,
        parents=[
            model_arguments(),
            engine_arguments(),
            debug_argument("tracebacks, and the engine's log on stderr"),
        ],
    )
    p.add_argument("paths", nargs="*", metavar="PATH", help="image, folder (recursive), glob, .txt list, .tar shard")
    p.add_argument("-o", "--output", metavar="FILE", help="file, or folder of shards (captions.*); - for stdout")
    p.add_argument("--format", choices=FORMATS, default="jsonl", help="jsonl (default), .txt beside each image, ...")
    p.add_argument("--shard", type=_shard, metavar="I/N", help="only the I-th of N parts of the input; I from 1 to N")
    p.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default) is greedy")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the random draws at a temperature above 0")
    p.add_argument("-n", type=positive, default=1, metavar="N", help="captions drawn per image; equal ones count once")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end captions before TEXT (repeatable)")
    p.add_argument("--limit", type=positive, metavar="N", help="only the first N images of the input")
    p.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="skip what the output already holds (default); --no-resume starts over and keeps the old file as NAME.old",
    )  # fmt: skip
    p.add_argument("--raw", action="store_true", help="captions as the model wrote them, without the clean-up")
    p.add_argument("--gallery", metavar="HTML", help="also write a page of image | reconstruction | caption")
    p.add_argument("--trace", metavar="JSON", help="also write when each stage worked, for ui.perfetto.dev")
    p.add_argument("--doctor", action="store_true", help="report what is installed and what is missing, and stop")
    return p


def _temperature(text: str) -> float:
    try:
        if 0 <= (value := float(text)) <= 10:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 10")


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"{text!r} is no part of a whole, such as 3/16 (from 1/16 to 16/16)")


class Stopped(BaseException):
    """A signal ended the run; like KeyboardInterrupt, no error."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    if args.doctor:
        from serve.reports.doctor import report

        return report()
    try:
        return run(_caption, args)
    except (Stopped, KeyboardInterrupt) as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        say(f"stopped by {number.name}: what is captioned so far is kept, and the same command goes on from here")
        # not sys.exit: it would wait for the threads that load or encode at this moment
        os._exit(128 + number)


def _caption(args: argparse.Namespace) -> int:
    if not args.paths or not args.ckpt:
        raise Misuse("PATH and --ckpt are needed (--help shows the usage)")
    if args.n > 1 and not args.temperature:
        raise Misuse(f"-n {args.n} draws captions: give --temperature above 0, greedy ones are all the same")
    if "" in args.stop:
        raise Misuse("--stop needs a text: '' would end every caption at once")
    if args.output == "-" and args.format != "jsonl":
        raise Misuse(f"--format {args.format} writes files: give -o a file or folder")
    if args.gallery and (args.output == "-" or args.format in ("parquet", "webdataset")):
        raise Misuse(
            "--gallery reads the captions back from JSON lines: give -o a file, in --format jsonl, txt or coco"
        )
    model = Model.of(args)
    items = _items(args)

    from serve.core.pipeline import Pipeline, PipelineConfig
    from serve.engines.base import Sampling
    from serve.outputs.formats import sink_class
    from serve.outputs.jsonl import StreamSink
    from serve.reports.progress import Progress
    from serve.reports.timeline import Timeline

    sampling = Sampling(model.max_tokens, args.temperature, args.seed, tuple(args.stop))
    config = PipelineConfig(
        sampling, args.prompt_batch, args.workers, args.limit, args.raw, args.n, args.encoder, args.artifacts
    )
    engine = model.engine()
    if args.output == "-":
        sink = StreamSink(_claim_stdout(), sys.stderr.fileno())
    else:
        sink = sink_class(args.format)(_output(args), engine.options.mark(model.checkpoint.hash), args.resume)
    progress, timeline = Progress(), Timeline(args.trace)
    threading.Thread(target=_count, args=(args, progress), daemon=True).start()
    try:
        _run(Pipeline(model.checkpoint, engine, sink, config, progress, timeline), items)
    finally:
        timeline.close()
        sink.close()
    if busy := timeline.summary():
        progress.show(busy, last=True)
    progress.show(progress.summary(), last=True)
    if args.gallery:
        from serve.reports import gallery

        gallery.write(Path(args.gallery), model.checkpoint, _items(args), sink.journal_path)
    if progress.failed:
        where = sink.errors_path or "the lines above"
        say(f"{progress.failed} of {progress.finished} images failed: see {where}")
        return 1
    return 0


def _items(args: argparse.Namespace):
    from serve.core.inputs import expand, part_of

    items = expand(args.paths)
    return part_of(items, *args.shard) if args.shard else items


def _output(args: argparse.Namespace) -> Path:
    """-o or its default; with --shard its name says which, since every worker has a file of its own."""
    endings = {"coco": ".json", "parquet": ".parquet", "webdataset": ""}
    path = Path(args.output or "captions" + endings.get(args.format, ".jsonl"))
    if args.shard:
        part, parts = args.shard
        path = path.with_name(f"{path.stem}-{part:0{len(str(parts))}}-of-{parts}{path.suffix}")
    return path


def _run(pipeline, items) -> None:
    """Run to the end, or to a signal: the first one stops in order, a second one at once. Raises Stopped."""

    async def run() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        caught = []

        def stop(number: signal.Signals) -> None:
            if caught:
                os._exit(128 + number)
            caught.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        try:
            await pipeline.run(items)
        except BaseException:
            if caught:
                raise Stopped(caught[0]) from None
            raise

    asyncio.run(run())


def _count(args: argparse.Namespace, progress) -> None:
    """Count the input beside the run, for the time left."""
    from serve.core.inputs import SourceError

    with contextlib.suppress(SourceError):
        progress.total = sum(1 for _ in itertools.islice(_items(args), args.limit))


def _claim_stdout() -> int:
    """A descriptor of stdout for data alone; whatever else this process or its children print goes to stderr."""
    data = os.dup(1)
    os.dup2(2, 1)
    return data


if __name__ == "__main__":
    sys.exit(main())
