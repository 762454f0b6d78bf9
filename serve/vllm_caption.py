"""Caption image files: python -m serve.vllm_caption PATHS... --ckpt DIR -o captions.jsonl

The record of an image is appended to the output as soon as it is done, so that a run which ends early, for whatever
reason, continues where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from serve import FORMATS
from serve.command import engine_arguments, model_arguments, open_model, placement_arguments
from vlv.common.command import Misuse, Parser, debug_argument, hush, positive, run_command, say

if TYPE_CHECKING:
    from serve.core.inputs import LeftOut
    from serve.core.model import Model
    from serve.core.run import CaptionRun

EXIT_CODES = """\
exit codes: 0 every image of this run has a caption (what earlier runs have finished is not looked at again);
1 the run failed, or some of its images did (see NAME.errors.jsonl); 2 wrong arguments; 130 stopped by Ctrl-C.
"""
SHOWN = 5  # names in a message
ENDINGS = {"coco": ".json", "kohya": ".json", "parquet": ".parquet", "webdataset": ""}


def parser() -> argparse.ArgumentParser:
    """Return the parser. Light: neither torch nor the service is imported for --help."""
    p = Parser(
        prog="python -m serve.vllm_caption",
        description="Caption images with a VLV checkpoint, through vLLM.\n\n"
        "    python -m serve.vllm_caption photos/ --ckpt DIR -o captions.jsonl --gallery gallery.html\n"
        "    python -m serve.vllm_caption photos/ --ckpt DIR --format txt               # photo.txt beside photo.jpg\n"
        "    python -m serve.vllm_caption 'shards/{000..099}.tar' --ckpt DIR --format webdataset -o out --shard 1/8",
        epilog=EXIT_CODES,
        parents=[
            model_arguments(),
            engine_arguments(),
            placement_arguments(),
            debug_argument("tracebacks, and the engine's log on stderr"),
        ],
    )
    p.add_argument("paths", nargs="*", metavar="PATH", help="image, folder (recursive), glob, list, .tar shard, or URL")
    p.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="file, or folder of shards; - for stdout (default: captions with the ending of the format)",
    )
    p.add_argument(
        "--format",
        choices=FORMATS,
        default="jsonl",
        help="format of the output (default: jsonl); txt: text files beside the images",
    )
    listing = p.add_argument_group("input")
    listing.add_argument(
        "--url-column",
        metavar="NAME",
        help="column of tables that has the images, URLs or paths (default: url, path, file_name, image or id)",
    )
    listing.add_argument("--limit", type=positive, metavar="N", help="only the first N images of the input")
    listing.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only the I-th of N parts of the input, such as 3/16"
    )
    listing.add_argument(
        "--lenient", action="store_true", help="caption the intact part of a truncated JPEG file; the rest is grey"
    )
    listing.add_argument(
        "--strict", action="store_true", help="exit with 1 if files are left out, such as broken links"
    )
    draws = p.add_argument_group("sampling")
    draws.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    draws.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the sampling at a temperature above 0 (default: 0)"
    )
    draws.add_argument(
        "-n", type=positive, default=1, metavar="N", help="captions drawn per image; equal ones count once (default: 1)"
    )
    draws.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end captions before TEXT (repeatable)"
    )
    reruns = p.add_argument_group("runs over an output that exists")
    reruns.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip what the output already holds (default); --no-resume starts over and keeps the old file as NAME.old",
    )
    reruns.add_argument(
        "--verify", action="store_true", help="find changed images by a hash of the file, not by size and time"
    )
    reruns.add_argument("--prune", action="store_true", help="remove records of images that are no longer in the input")
    reruns.add_argument("--dry-run", action="store_true", help="print the images that would be captioned, and stop")
    reruns.add_argument(
        "--patch", type=Path, metavar="JSONL", help="first apply captions that were edited on the --gallery page"
    )
    texts = p.add_argument_group("text files (--format txt without -o)")
    texts.add_argument(
        "--caption-extension", default=".txt", metavar="EXT", help="ending of the text files (default: .txt)"
    )
    texts.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="write a tree of text files like that of the images"
    )
    existing = texts.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="skip images that have a text file (default)")
    existing.add_argument("--overwrite", action="store_true", help="replace text files that exist")
    style = p.add_argument_group("form of the captions, in this order")
    style.add_argument("--raw", action="store_true", help="leave out the published clean-up of captions")
    style.add_argument("--strip-openers", action="store_true", help='remove "The image shows" and the like')
    style.add_argument("--max-sentences", type=positive, metavar="N", help="only the first N sentences")
    style.add_argument("--max-words", type=positive, metavar="N", help="whole sentences that fit into N words")
    style.add_argument("--single-line", action="store_true", help="replace line breaks by spaces")
    style.add_argument(
        "--template",
        default="{caption}",
        metavar="TEXT",
        help='text around the caption, such as "a sks photo, {caption}"',
    )
    reports = p.add_argument_group("reports")
    reports.add_argument("--gallery", metavar="HTML", help="also write a page to look through and edit captions")
    reports.add_argument(
        "--trace", metavar="JSON", help="also write when each stage worked, to open at ui.perfetto.dev"
    )
    reports.add_argument("--doctor", action="store_true", help="print what is installed and what is missing, and stop")
    reports.add_argument(
        "--plan",
        metavar="CKPT",
        help="print the GPU memory and the cost of captions, and stop; CKPT: as --ckpt, or qwen2.5-0.5b, -1.5b, -3b",
    )
    reports.add_argument(
        "--gpu-memory", type=_amount, metavar="GB", help="with --plan: the GPU's memory, to see what fits"
    )
    reports.add_argument("--price", type=_amount, metavar="USD", help="with --plan: price of the GPU for an hour")
    return p


def _amount(text: str) -> float:
    try:
        if (value := float(text)) > 0 and math.isfinite(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def _temperature(text: str) -> float:
    try:
        if 0 <= (value := float(text)) <= 10:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 10, got {text!r}")


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"expected a part such as 3/16 (from 1/16 to 16/16), got {text!r}")


class Stopped(BaseException):
    """Raised when a signal ended the run; like KeyboardInterrupt, it is no error."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    if args.doctor:
        from serve.reports.doctor import report

        return report(args.ckpt)
    if args.plan:
        return run_command(_plan, args)
    try:
        return run_command(_caption, args)
    except Stopped as stopped:
        (number,) = stopped.args
        say(f"stopped by {number.name}: what is captioned so far is kept, and the same command continues from there")
        # not sys.exit: it would wait for the threads that load or encode at this moment
        os._exit(128 + number)


def _plan(args: argparse.Namespace) -> None:
    hush()  # before transformers is imported, which warns of torchvision

    from serve.reports.capacity import report
    from vlv.checkpoints.folder import CheckpointError
    from vlv.model.config import PRESETS

    try:
        print(report(args.plan, args.gpu_memory, args.price, args.max_tokens or 300, args.prompt_batch))
    except CheckpointError as error:
        raise Misuse(f"--plan: {error}, or a preset: {', '.join(PRESETS)}") from error


def _caption(args: argparse.Namespace) -> int:
    _check(args)
    if args.dry_run:
        return _dry_run(args)

    from serve.core.inputs import LeftOut

    left_out = LeftOut()
    items = _items(args, left_out)  # before torch is imported: a wrong path is refused at once
    model = open_model(args)

    from serve.core.run import CaptionRun, RunConfig
    from serve.core.style import CaptionStyle
    from serve.engines.base import Sampling
    from serve.outputs.factory import sink_class
    from serve.outputs.jsonl import StreamSink, read_patch
    from serve.reports import gallery
    from serve.reports.progress import Progress
    from serve.reports.timeline import Timeline

    sampling = Sampling(model.max_tokens, args.temperature, args.seed, tuple(args.stop))
    flags = _flags(args, model)
    config = RunConfig(
        sampling,
        args.prompt_batch,
        args.workers,
        args.limit,
        args.raw,
        args.n,
        args.encoder,
        args.artifacts,
        flags,
        CaptionStyle(args.strip_openers, args.max_sentences, args.max_words, args.single_line, args.template),
        args.ignore_icc,
        args.precision,
        args.cuda_graphs,
        args.crop,
        args.verify,
        args.fast_jpeg,
    )
    engine = model.engine()
    if args.output == "-":
        sink = StreamSink(_claim_stdout(), sys.stderr.fileno())
    elif _only_texts(args):
        sink = _text_sink(args)
    else:
        model_id = engine.options.model_id(model.checkpoint.hash)
        sink = sink_class(args.format)(_output(args), model_id, args.resume, flags, args.verify)
    if args.patch:
        count = sink.patch(edits := read_patch(args.patch))
        say(f"{count} captions corrected; {len(edits) - count} of the patch were not as the page showed them")
    progress, timeline = Progress(), Timeline(args.trace)
    threading.Thread(target=_count, args=(args, progress), daemon=True).start()
    if sink.changed:
        say(f"{sink.changed} images have changed since they were captioned: they are captioned again")
    captioning = CaptionRun(model.checkpoint, engine, sink, config, progress, timeline)
    try:
        _run(captioning, items)
        if captioning.complete:
            _report_missing(sink, captioning.listed, args.prune)
    finally:
        timeline.close()
        sink.close()
    if busy := timeline.summary():
        progress.show(busy, last=True)
    progress.show(progress.summary(), last=True)
    if args.gallery:
        gallery.write(Path(args.gallery), model.checkpoint, _items(args), sink.journal_path)
    if line := str(left_out):
        say(line)
    if progress.failed:
        where = sink.errors_path or "the lines above"
        say(f"{progress.failed} of {progress.finished} images failed: see {where}")
        return 1
    return int(args.strict and bool(left_out.images or left_out.replaced))


def _only_texts(args: argparse.Namespace) -> bool:
    """Return True if the text files are the only output."""
    return args.format == "txt" and args.output is None


def _text_sink(args: argparse.Namespace):
    from serve.outputs.text import TextFiles, TextSink, common_folder

    extension = "." + args.caption_extension.removeprefix(".")
    base = common_folder(args.paths) if args.output_dir else ""
    return TextSink(TextFiles(extension, args.output_dir, base), args.overwrite)


def _dry_run(args: argparse.Namespace) -> int:
    """Print the ids of images; of text files, only of the images that have none."""
    from serve.core.id_set import IdSet
    from serve.core.inputs import LeftOut, stamp_of

    left_out, named, count, done = LeftOut(), IdSet(), 0, 0
    sink = _text_sink(args) if _only_texts(args) else None
    for item in itertools.islice(_items(args, left_out), args.limit):
        if not named.add(item.key):  # by another spelling of its path
            continue
        if sink and sink.is_finished(item, (stamp_of(item.path) or (None,))[0]):
            done += 1
        else:
            print(item.id)
            count += 1
    say(f"{count} images to caption" + (f", {done} have a text file" if sink else ", less those in the output"))
    if line := str(left_out):
        say(line)
    return int(args.strict and bool(left_out.images or left_out.replaced))


def _report_missing(sink, listed, prune: bool) -> None:
    """Name the captioned images that are not in the input any more, or remove their records with `prune`."""
    from serve.outputs.jsonl import is_listed

    missing = sink.missing(listed)
    names = list(itertools.islice(missing, SHOWN))
    count = len(names) + sum(1 for _ in missing)
    if prune:
        removed = sink.drop(lambda record: not is_listed(record, listed))
        if removed:
            say(f"removed the records of {removed} images that are not in the input any more")
    elif count:
        more = ", ..." if count > SHOWN else ""
        say(f"{count} images of the output are not in this input (--prune removes them): {', '.join(names)}{more}")


def _check(args: argparse.Namespace) -> None:
    """Raise Misuse for arguments that do not fit together."""
    if not args.paths or not (args.ckpt or args.dry_run):
        raise Misuse("PATH and --ckpt are needed (--help shows the usage)")
    if args.n > 1 and not args.temperature:
        raise Misuse(f"-n {args.n} draws captions: give --temperature above 0, greedy ones are all the same")
    if "" in args.stop:
        raise Misuse("--stop needs a text: '' would end every caption at once")
    if "{caption}" not in args.template:
        raise Misuse(f"--template {args.template!r}: expected a text with {{caption}}, such as 'a photo, {{caption}}'")
    if (args.overwrite or args.output_dir or args.caption_extension != ".txt") and not _only_texts(args):
        raise Misuse("--output-dir, --overwrite and --caption-extension go with --format txt and without -o")
    _check_extension(args.caption_extension)
    if (args.verify or args.prune) and (args.output == "-" or _only_texts(args)):
        raise Misuse("--verify and --prune need the records of a run: give -o a file or folder")
    if args.output == "-" and args.format != "jsonl":
        raise Misuse(f"--format {args.format} writes files: give -o a file or folder")
    if (args.gallery or args.patch) and (
        args.output == "-" or _only_texts(args) or args.format in ("parquet", "webdataset")
    ):
        raise Misuse(
            "--gallery reads the captions back from JSON lines, which --patch edits: give -o a file, in a --format "
            "other than parquet and webdataset"
        )
    _check_reports(args)


def _check_extension(extension: str) -> None:
    """Raise Misuse for an extension that would replace images, or gives no file's name."""
    from vlv.data.image_files import is_image

    name = "x." + extension.removeprefix(".")
    if is_image(name) or name.endswith(".") or "/" in name or "\0" in name:
        raise Misuse(f"--caption-extension {extension!r}: expected the ending of a text file, such as .caption")


def _check_reports(args: argparse.Namespace) -> None:
    """Raise Misuse if a report would replace the output, another report, or a file that is no such report."""
    output = None if args.output == "-" or _only_texts(args) else _output(args)
    named: dict[str, str] = {}  # option by file
    for option, path in (("-o", output), ("--patch", args.patch), ("--gallery", args.gallery), ("--trace", args.trace)):
        if path and (other := named.setdefault(os.path.realpath(path), option)) != option:
            raise Misuse(f"{other} and {option} are one file, {path}: choose another name")
    for option, path, start in (("--gallery", args.gallery, b"<!doctype html"), ("--trace", args.trace, b"[")):
        if path and os.path.isfile(path):
            with open(path, "rb") as file:
                if not start.startswith(file.read(len(start)).lower()):
                    raise Misuse(f"{option} {path} is there already, and no such report: choose another name")


def _flags(args: argparse.Namespace, model: Model) -> str:
    """Return the flags that change captions, for the records: a run with others does not continue the output."""
    given = {
        "--temperature": args.temperature or None,
        "--seed": args.seed if args.temperature and args.seed else None,
        "-n": args.n if args.n > 1 else None,
        "--max-sentences": args.max_sentences,
        "--max-words": args.max_words,
    }
    words = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    words += [f"--stop {shlex.quote(text)}" for text in sorted(args.stop)]
    switches = {
        "--lenient": args.lenient,
        "--raw": args.raw,
        "--strip-openers": args.strip_openers,
        "--single-line": args.single_line,
    }
    words += [flag for flag, given in switches.items() if given]
    words += [f"--template {shlex.quote(args.template)}"] * (args.template != "{caption}")
    return " ".join([model.flags] * bool(model.flags) + words)


def _items(args: argparse.Namespace, left_out: LeftOut | None = None):
    from serve.core.inputs import expand, part_of

    items = expand(args.paths, left_out, args.url_column, args.lenient)
    return part_of(items, *args.shard) if args.shard else items


def _output(args: argparse.Namespace) -> Path:
    """Return -o or its default; with --shard, its name tells the part, since every worker has a file of its own."""
    name = "captions" + ENDINGS.get(args.format, ".jsonl")
    if args.format == "imagefolder":  # among the images
        from serve.outputs.text import common_folder

        name = os.path.join(common_folder(args.paths), "metadata.jsonl")
    path = Path(args.output or name)
    if args.shard:
        part, parts = args.shard
        path = path.with_name(f"{path.stem}-{part:0{len(str(parts))}}-of-{parts}{path.suffix}")
    return path


def _run(captioning: CaptionRun, items) -> None:
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
            await captioning.run(items)
        except BaseException:
            if caught:
                raise Stopped(caught[0]) from None
            raise

    asyncio.run(run())


def _count(args: argparse.Namespace, progress) -> None:
    """Count the input during the run, for the time left."""
    from serve.core.inputs import SourceError

    with contextlib.suppress(SourceError):
        progress.total = sum(1 for _ in itertools.islice(_items(args), args.limit))


def _claim_stdout() -> int:
    """Return a descriptor of stdout for data alone; what else this process or its children print goes to stderr."""
    data = os.dup(1)
    os.dup2(2, 1)
    return data


if __name__ == "__main__":
    sys.exit(main())
