"""Build TensorRT-RTX or TensorRT engines: python -m export.trt --ckpt DIR --out ARTIFACTS --target sm89

What is not yet exported to ONNX in ARTIFACTS is exported and verified first. TensorRT-RTX builds without a GPU, for
the targets that it knows; TensorRT (--runtime trt) builds on the GPU that the engine is for. An engine is kept as long
as its graph, shapes, precision, target and builder stay the same. With --plugins, TensorRT runs our fused kernels; such
an engine computes batches of one size, the largest, and pads smaller ones.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from export import cli, onnx
from export.components import OLDEST_FP8, ORT_ONLY, QUANTIZED


def _target(text: str) -> str:
    if re.fullmatch(r"sm\d{2,3}", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no compute capability such as sm89")


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    p = cli.parser("trt", __doc__)
    onnx.add_arguments(p)
    p.add_argument("--target", type=_target, required=True, metavar="SM", help="sm86, sm89, sm90 …: the GPU to run on")
    p.add_argument("--runtime", choices=("rtx", "trt"), default="rtx", help="TensorRT-RTX (default) or TensorRT")
    p.add_argument(
        "--plugins", choices=("auto", "on", "off"), default="auto",
        help="our kernels in the engine: auto means for TensorRT in half precision; TensorRT-RTX has no plugins (auto)",
    )  # fmt: skip
    p.add_argument("--refittable", action="store_true", help="build engines that --refit can give other weights")
    p.add_argument("--refit", action="store_true", help="put a checkpoint's weights into the engine that is there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser().parse_args(argv), _build_all)


def _build_all(args: argparse.Namespace) -> int:
    from export.manifest import Manifest, workspace
    from export.runtimes.tensorrt_library import LIBRARIES, device_target

    library = LIBRARIES[args.runtime]
    library.load()  # what is missing is told before anything is exported
    if args.runtime == "trt" and (here := device_target()) != args.target:
        raise cli.Misuse(
            f"--target {args.target}: TensorRT builds on the GPU that an engine is for, and this machine has "
            f"{here or 'none'}; --runtime rtx builds for GPUs elsewhere"
        )
    if args.precision in ORT_ONLY:
        raise cli.Misuse(f"--precision {args.precision} is for ONNX Runtime: TensorRT's is int8-trt")
    if args.precision == "fp8" and int(args.target[2:]) < OLDEST_FP8:
        raise cli.Misuse(
            f"--precision fp8: {args.target} has no 8-bit floats, GPUs from sm{OLDEST_FP8} on have: "
            "choose int8-trt or fp16"
        )
    args.refittable |= args.refit  # what was refitted can be again
    checkpoint = cli.checkpoint(args.ckpt)
    names = cli.components(args.components, checkpoint)
    if code := onnx.run(argparse.Namespace(**{**vars(args), "force": False})):
        return code
    with workspace(args.out) as made:
        manifest = Manifest.open(args.out)
        for name in names:
            _build(args, manifest, name, library, made, checkpoint)
    return 0


def _wants_plugins(asked: str, runtime: str, precision: str) -> bool:
    """Whether an engine gets our kernels. Says why not where they were asked for. Raises RuntimeUnavailable."""
    from importlib.util import find_spec

    from export.plugins import HALF
    from export.runtimes.base import RuntimeUnavailable

    built = find_spec("triton") is not None
    if runtime == "rtx" or precision in QUANTIZED:
        reason = "TensorRT-RTX has no plugins" if runtime == "rtx" else f"{precision} is made from the plain graph"
        if asked == "on":
            cli.say(f"--plugins on: {reason}, so the engine is built from the plain graph")
        return False
    if asked == "on" and not built:
        raise RuntimeUnavailable("--plugins on: our kernels are built by Triton, which is not here: pip install triton")
    return asked == "on" or (asked == "auto" and built and precision in HALF)


def _build(args: argparse.Namespace, manifest, name: str, library, made: Path, checkpoint) -> None:
    """One engine, unless it is there."""
    from dataclasses import replace

    from export import lint, plugins
    from export.components import Batch
    from export.manifest import ArtifactError, describe_files, name_of
    from export.runtimes import tensorrt_library

    graph = manifest.checked(name)
    wanted = replace(
        graph, runtime=args.runtime, target=args.target, files={}, verification={},
        builder=library.builder, command=_command(args, name),
        refittable=args.refittable,
    )  # fmt: skip
    fused = _wants_plugins(args.plugins, args.runtime, graph.precision)
    if fused:
        wanted = replace(wanted, kernels=plugins.source_hash())
    label = name_of(name, args.runtime, args.target)
    if not args.force and manifest.current(wanted):
        cli.say(f"{label}: up to date")
        return
    source = manifest.folder / graph.main_file
    if problems := lint.problems(source, graph, args.runtime):
        raise ArtifactError(f"{label}: {'; '.join(problems)}")
    start, cache = time.monotonic(), manifest.folder / f"timing-{args.runtime}-{args.target}.cache"
    file, profile = f"{name}.{args.runtime}-{args.target}.engine", graph.profile
    if fused and (made_with := plugins.make(checkpoint, graph, made, source, args.target)):
        source, profile = made_with[0], Batch(profile.most, profile.most, profile.most)
        plugins.register(library.load(), made_with[1])
        cli.say(f"{label}: {len(made_with[1])} kernels of ours, for batches of {profile.most}")
    if args.refit:
        from export.runtimes.tensorrt import refit

        old = manifest.find(name, args.runtime, args.target)
        manifest.require_intact(old)  # not `checked`: it is older than its graph, which is what refitting is for
        (made / file).write_bytes(refit(library, old, manifest.folder / old.main_file, source))
        verb = "refitted"
    else:
        timing = cache.read_bytes() if cache.is_file() else b""
        built = tensorrt_library.build(
            library, str(source), graph.inputs, profile, args.target, timing, args.refittable
        )
        (made / file).write_bytes(built[0])
        if built[1]:
            (made / cache.name).write_bytes(built[1])
            (made / cache.name).replace(cache)
        verb = "built"
    files = describe_files(made, [file])
    manifest.publish(replace(wanted, files=files), made)
    cli.say(f"{label}: {verb} in {time.monotonic() - start:.0f} s, {files[file]['bytes'] / 1e6:.1f} MB")


def _command(args: argparse.Namespace, name: str) -> str:
    more = ["--target", args.target, "--runtime", args.runtime, "--plugins", args.plugins]
    return onnx.command(args, name, "export.trt", [*more, *(["--refittable"] if args.refittable else [])])


if __name__ == "__main__":
    sys.exit(main())
