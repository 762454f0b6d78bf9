"""Measure a checkpoint here and see it on one page: python -m benchmarks.measure IMAGES --ckpt DIR -o out/report

Runs the project's own commands one after another, as one would by hand: exports of the encoder, export.bench over the
runtimes that work here, serve.vllm_caption with its trace, a server under serve.bench's load; and at the end
benchmarks.report, which shows them beside the committed figures: out/report/report.html. A command that fails stops it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks import machine, report
from vlv.common.command import Parser, positive, say
from vlv.common.files import atomic_write


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    p = Parser(prog="python -m benchmarks.measure", description=__doc__)
    p.add_argument("paths", nargs="+", metavar="IMAGES", help="images to caption: files, folders, globs")
    p.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument(
        "--engine", choices=("vllm", "transformers"), default="vllm", help="what runs the language model (vllm)"
    )
    p.add_argument("--precisions", nargs="+", default=["fp32", "int8"], metavar="P", help="exports (fp32 int8)")
    p.add_argument("--runtimes", nargs="+", metavar="NAME", help="of the encoder (default: all that work here)")
    p.add_argument("--batches", nargs="+", default=["1", "8"], metavar="N", help="batch sizes of the encoder (1 8)")
    p.add_argument("--repeats", type=positive, default=20, metavar="N", help="timed calls of each runtime (20)")
    p.add_argument("--rates", default="1,2,4", metavar="R,R", help="requests offered a second (1,2,4)")
    p.add_argument("--seconds", type=positive, default=30, metavar="S", help="of load at each rate (30)")
    p.add_argument("-o", "--output", type=Path, default=Path("out/report"), metavar="DIR")
    return p


class Failed(RuntimeError):
    """A command has failed, and has said why."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        files = _measure(args)
    except Failed as error:
        say(f"error: {error}")
        return 1
    page = args.output / "report.html"
    with atomic_write(page) as file:
        content = report.page(files["load"], files["trace"], files["bench"], files["artifacts"])
        file.write_text(content, encoding="utf-8")
    print(page)
    return 0


def _measure(args: argparse.Namespace) -> dict:
    """Run everything; returns what benchmarks.report.page takes."""
    load, trace, bench = (args.output / f"{name}.json" for name in ("load", "trace", "bench"))
    folders = [args.output / precision for precision in args.precisions]
    for folder, precision in zip(folders, args.precisions, strict=True):
        words = ["--components", "encoder", "--precision", precision]
        _run("export.onnx", "--ckpt", args.ckpt, "--out", str(folder), *words)
    words = ["--batches", *args.batches, "--repeats", str(args.repeats), "--out", str(bench)]
    words += ["--runtimes", *args.runtimes] if args.runtimes else []
    _run("export.bench", "--artifacts", str(folders[0]), "--ckpt", args.ckpt, *words)
    model = ["--ckpt", args.ckpt, "--engine", args.engine]
    words = ["--trace", str(trace), "-o", str(args.output / "captions.jsonl"), "--no-resume"]
    _run("serve.vllm_caption", *args.paths, *model, *words)
    with _server(model) as url:
        words = ["--rates", args.rates, "--seconds", str(args.seconds), "-o", str(load)]
        about = machine.describe()
        _run("serve.bench", *args.paths, "--url", url, *words)
    load.write_text(json.dumps({**json.loads(load.read_text()), "machine": about}, indent=1) + "\n")
    return {"load": load, "trace": trace, "bench": bench, "artifacts": folders}


def _command(module: str, *words: str) -> list[str]:
    command = [sys.executable, "-m", module, *words]
    say(shlex.join(["python", *command[1:]]))
    return command


def _run(module: str, *words: str) -> None:
    if code := subprocess.run(_command(module, *words), stdout=sys.stderr).returncode:
        raise Failed(f"{module} ended with {code}")


@contextmanager
def _server(model: list[str]) -> Iterator[str]:
    """A server on a free port, once it is ready; its URL."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(_command("serve.server", *model, "--port", str(port)))
    try:
        while not _ready(url):
            if process.poll() is not None:
                raise Failed(f"serve.server ended with {process.returncode}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, TimeoutError, OSError):  # 503 while it loads
        return False


if __name__ == "__main__":
    sys.exit(main())
