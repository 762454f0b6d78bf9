"""Measure the Python environment of deploy/docker/gpu.Dockerfile with all device code, and with that of one GPU.

    python3.12 -m venv TREE && TREE/bin/pip install --no-deps -r requirements/gpu.lock
    TREE/bin/python -m benchmarks.container --tree TREE --sm 90 -o benchmarks/container.json

TREE is changed: it is what the image copies to /opt/vlv. `packed_bytes` is what a registry would hold of it: tar and
zstd, at zstd's default level. Run it from the repository, on a machine with zstd and gcc. Nothing here needs a GPU:
before and after, every module of vLLM and of ours is imported, every library is loaded, with a driver that only has the
names of its functions, and the bundled checkpoint captions assets/samples on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("vllm", "kernels", "vlv", "export", "serve")  # all of their modules are imported
LIBRARIES = ("torch", "triton", "transformers", "diffusers", "xgrammar", "pyarrow.parquet", "uvicorn", "uvloop")
NAMED = 20  # of the largest libraries
IMPORT_TIME = 900  # seconds for all modules
TOOL = ROOT / "deploy/docker/slim_cuda.py"
# two lines for each module or library: its name; then its name with "imported" or the error
IMPORTER = """
import ctypes, importlib, json, sys
import torch
for name in json.load(sys.stdin):
    print(json.dumps([name]), file=sys.__stderr__, flush=True)
    try:
        ctypes.CDLL(name) if "/" in name else importlib.import_module(name)
        found = "imported"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"[:200]
    print(json.dumps([name, found]), file=sys.__stderr__, flush=True)
"""


def size(tree: Path) -> int:
    """Return the bytes of all files below a folder; hard links count once."""
    files = (path.lstat() for path in tree.rglob("*") if path.is_file() or path.is_symlink())
    return sum({(status.st_dev, status.st_ino): status.st_size for status in files}.values())


def packed(tree: Path) -> int:
    """Return the bytes of a folder as one compressed layer."""
    pipe = ["bash", "-c", 'set -o pipefail; tar -C "$1" -cf - . | zstd -q -c | wc -c', "bash", tree]
    return int(subprocess.run(pipe, check=True, capture_output=True, text=True).stdout)


def modules(tree: Path) -> list[str]:
    """Return the names of LIBRARIES, and of all modules of PACKAGES, in the tree or in this repository."""
    (site,) = tree.glob("lib/python*/site-packages")
    found = []
    for package in PACKAGES:
        base = site if (site / package).is_dir() else ROOT
        for path in (base / package).rglob("*.py"):
            *folders, name = path.relative_to(base).with_suffix("").parts
            compiles = name == "hf3fs_utils" or "third_party" in folders  # with a compiler, for minutes
            if name != "__main__" and not compiles and all(part.isidentifier() for part in (*folders, name)):
                found.append(".".join(folders if name == "__init__" else (*folders, name)))
    return [*LIBRARIES, *sorted(found)]


def libraries(tree: Path) -> list[str]:
    """Return the paths of torch's, vLLM's and NVIDIA's shared libraries in the tree."""
    (site,) = tree.glob("lib/python*/site-packages")
    found = (path for name in ("torch", "vllm", "nvidia") for path in (site / name).rglob("*.so*"))
    return [str(path) for path in sorted(found) if not path.is_symlink() and "third_party" not in path.parts]


def write_driver(tree: Path, folder: Path) -> None:
    """Write libcuda.so.1 into a folder: the driver's functions that the libraries name; each returns "no device"."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries(tree)], capture_output=True, text=True).stdout
    names = sorted(set(re.findall(r" U (cu[A-Z][a-z]\w*)$", listed, re.M)))
    source = "\n".join(f"int {name}(void) {{ return 100; }}" for name in names)
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)


def imports(tree: Path, names: list[str], driver: Path) -> dict[str, str]:
    """Import modules, and load libraries by their path; return for each "imported", or its error.

    One that ends Python ends itself alone. `driver`: the folder of write_driver.
    """
    found, environment = {}, {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONDONTWRITEBYTECODE": "1"}
    while rest := [name for name in names if name not in found]:
        run = subprocess.run(
            [tree / "bin/python", "-c", IMPORTER],
            cwd=ROOT,
            env=environment,
            input=json.dumps(rest),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=IMPORT_TIME,
        )
        lines = [json.loads(line) for line in run.stderr.splitlines() if line.startswith('["')]
        begun = {line[0]: f"ended Python with {run.returncode}" for line in lines}
        if not begun:
            raise RuntimeError(f"{tree}/bin/python does not start: {run.stderr[-500:]}")
        found |= begun | {line[0]: line[1] for line in lines if len(line) == 2}
    return found


def compared(names: list[str], full: dict[str, str], slim: dict[str, str]) -> dict:
    """Return how many of some modules or libraries are imported before and after, and those that no longer are."""
    lost = {name: slim[name] for name in names if full[name] == "imported" != slim[name]}
    count = {f"imported_by_{key}": sum(found[name] == "imported" for name in names) for key, found in
             (("full", full), ("slim", slim))}  # fmt: skip
    return {"tried": len(names), **count, "imported_by_full_alone": lost}


def packages(tree: Path) -> int:
    """Return the number of installed packages."""
    return len(list(tree.glob("lib/python*/site-packages/*.dist-info")))


def captions(tree: Path) -> list[str]:
    """Return the captions of assets/samples by the bundled checkpoint, through transformers on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "captions.jsonl")
        command = ["-m", "serve.vllm_caption", "assets/samples", "--ckpt", "assets/vlv-tiny", "-o", out]
        options = ["--engine", "transformers"]
        subprocess.run([tree / "bin/python", *command, *options], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        records = sorted(map(json.loads, out.read_text().splitlines()), key=lambda record: record["id"])
    return [record["caption"] for record in records]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="the environment, with requirements/gpu.lock")
    parser.add_argument("--sm", type=int, required=True, help="compute capability without its point, such as 90")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="JSON")
    args = parser.parse_args()
    tree, python = args.tree, args.tree / "bin/python"
    result: dict = {
        "command": f"python -m benchmarks.container --tree TREE --sm {args.sm} -o {args.output}",
        "python": sys.version.split()[0],
        "load_before": round(os.getloadavg()[0], 2),
    }
    names, paths = modules(tree), libraries(tree)
    with tempfile.TemporaryDirectory() as folder:
        report, driver = Path(folder, "report.json"), Path(folder)
        write_driver(tree, driver)
        full, written = imports(tree, names + paths, driver), captions(tree)
        result["full"] = {"packages": packages(tree), "bytes": size(tree), "packed_bytes": packed(tree)}
        start = time.monotonic()
        subprocess.run([python, "-m", "pip", "uninstall", "-y", "-q", "-r", TOOL.with_name("slim.txt")], check=True)
        subprocess.run([python, TOOL, "--sm", str(args.sm), tree, "--report", report], check=True)
        seconds = round(time.monotonic() - start, 1)
        result["slim"] = {"packages": packages(tree), "bytes": size(tree), "packed_bytes": packed(tree)}
        result["slim"]["seconds"] = seconds
        for key in ("bytes", "packed_bytes"):
            result[f"share_of_{key}"] = round(result["slim"][key] / result["full"][key], 3)
        slim, again = imports(tree, [*names, *filter(os.path.exists, paths)], driver), captions(tree)
        shortened = json.loads(report.read_text())
    result["modules"] = compared(names, full, slim)
    result["shared_libraries"] = compared([path for path in paths if path in slim], full, slim)
    result["captions"] = {"written": len(written), "equal": sum(map(str.__eq__, written, again))}
    files = shortened["files"]
    result["shortened"] = {"count": len(files), "bytes": shortened["before"], "bytes_slim": shortened["after"]}
    result["unused_files_removed_bytes"] = shortened["removed"]
    result["largest"] = {
        Path(path).name: {"bytes": sizes["before"], "bytes_slim": sizes["after"], "held": sizes["architectures"]}
        for path, sizes in sorted(files.items(), key=lambda item: -item[1]["before"])[:NAMED]
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("full", "slim", "share_of_packed_bytes", "captions")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
