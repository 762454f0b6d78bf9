"""Measure the Python environment of deploy/docker/gpu.Dockerfile with all device code, and with that of one GPU.

    python3.12 -m venv TREE && TREE/bin/pip install --no-deps -r requirements/gpu.lock
    TREE/bin/python -m benchmarks.container --tree TREE --sm 90 -o benchmarks/container.json

TREE is changed: it is what the image copies to /opt/vlv. The imports need no GPU. `packed_bytes` is what a registry
would hold of it: tar and zstd, at zstd's default level. Run it from the repository, on a machine with zstd.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

IMPORTS = ("torch", "triton", "cutlass", "transformers", "diffusers", "vllm", "serve.http.routes", "serve.engines.vllm")
LARGEST = 12  # libraries that are named
TOOL = Path(__file__).parents[1] / "deploy/docker/slim_cuda.py"


def size(tree: Path) -> int:
    """Return the bytes of all files below a folder; hard links count once."""
    files = (path.lstat() for path in tree.rglob("*") if path.is_file() or path.is_symlink())
    return sum({(status.st_dev, status.st_ino): status.st_size for status in files}.values())


def packed(tree: Path) -> int:
    """Return the bytes of a folder as one compressed layer."""
    pipe = ["bash", "-c", 'set -o pipefail; tar -C "$1" -cf - . | zstd -q -c | wc -c', "bash", tree]
    return int(subprocess.run(pipe, check=True, capture_output=True, text=True).stdout)


def measure(tree: Path) -> dict:
    """Return the sizes of an environment, and what can be imported in it."""
    return {"bytes": size(tree), "packed_bytes": packed(tree), "imports": imports(tree / "bin/python")}


def imports(python: Path) -> dict[str, str]:
    """Import each module in a process of its own; return "imported", or the last line of its error."""
    found = {}
    for module in IMPORTS:
        run = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
        found[module] = "imported" if run.returncode == 0 else run.stderr.strip().splitlines()[-1][:200]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="the environment, with requirements/gpu.lock")
    parser.add_argument("--sm", type=int, required=True, help="compute capability without its point, such as 90")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="JSON")
    args = parser.parse_args()
    python, report = args.tree / "bin/python", args.output.with_suffix(".slim.json")
    result: dict = {
        "command": f"python -m benchmarks.container --tree TREE --sm {args.sm} -o {args.output}",
        "python": sys.version.split()[0],
        "packages": len(list(args.tree.glob("lib/python*/site-packages/*.dist-info"))),
        "load_before": round(os.getloadavg()[0], 2),
        "full": measure(args.tree),
    }
    start = time.monotonic()
    subprocess.run([python, "-m", "pip", "uninstall", "-y", "-q", "-r", TOOL.with_name("slim.txt")], check=True)
    subprocess.run([python, TOOL, "--sm", str(args.sm), args.tree, "--report", report], check=True)
    slim = json.loads(report.read_text())
    report.unlink()
    seconds = round(time.monotonic() - start, 1)
    result["slim"] = {**measure(args.tree), "seconds": seconds}
    for key in ("bytes", "packed_bytes"):
        result[f"share_of_{key}"] = round(result["slim"][key] / result["full"][key], 3)
    largest = sorted(slim["files"].items(), key=lambda item: -item[1]["before"])[:LARGEST]
    result["libraries"] = {"count": len(slim["files"]), "bytes": slim["before"], "bytes_slim": slim["after"]}
    result["unused_files_removed_bytes"] = slim["removed"]
    result["largest"] = {
        Path(path).name: {"bytes": sizes["before"], "bytes_slim": sizes["after"], "held": sizes["architectures"]}
        for path, sizes in largest
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['full']['bytes']:,} bytes with all device code, {result['slim']['bytes']:,} with SM {args.sm} alone"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
