#!/usr/bin/env python3
"""Do what the tests need of helm with Helm's own library, for machines that get packages from pip alone:

    HELM=scripts/helm.py make test ARGS=tests/deploy        # make test-all sets it where there is no helm
    scripts/helm.py lint [--strict] CHART
    scripts/helm.py template NAME CHART [--set A=B] [--show-only templates/FILE]

Needs helm-python-sdk. helm sorts manifests by kind, and the library does not: KINDS is the order of helm's
pkg/release/v1/util/kind_sorter.go for the kinds of this chart.
"""

from __future__ import annotations

import argparse
import re
import sys

import helm_python

KINDS = ("NetworkPolicy", "PodDisruptionBudget", "Service", "Deployment", "HorizontalPodAutoscaler", "Job")
WARNING = 2  # severity of a message of lint


def template(name: str, chart: str, settings: list[str], only: list[str]) -> str:
    """Return the manifests as `helm template` prints them. Raises HelmError, ValueError for a kind not in KINDS."""
    loaded, values = helm_python.Chart.load(chart), {}
    for setting in settings:
        merge(values, helm_python.parse_set_string(setting))
    found = []
    for path, text in loaded.render(values, name=name, is_install=True).items():
        is_manifest = path.endswith(".yaml") and text.strip()  # not the notes for whoever installs it
        if not is_manifest or (only and path.split("/", 1)[1] not in only):
            continue
        kind = re.search(r"^kind: (\w+)$", text, re.M)[1]
        found.append((KINDS.index(kind), path, f"---\n# Source: {path}\n{text.strip()}\n"))
    return "".join(text for _, _, text in sorted(found))


def merge(values: dict, more: dict) -> None:
    """Put the settings of `more` into `values`, level by level."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    lint = actions.add_parser("lint")
    lint.add_argument("chart")
    lint.add_argument("--strict", action="store_true")
    render = actions.add_parser("template")
    render.add_argument("name")
    render.add_argument("chart")
    render.add_argument("--set", action="append", default=[])
    render.add_argument("--show-only", action="append", default=[])
    args = parser.parse_args()
    try:
        if args.action == "template":
            sys.stdout.write(template(args.name, args.chart, args.set, args.show_only))
            return 0
        report = helm_python.lint(args.chart, strict=args.strict)
    except helm_python.HelmError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for message in report["messages"]:
        print(f"{message['path']}: {message['error']}", file=sys.stderr)
    return int(bool(report["errors"]) or any(message["severity"] >= WARNING for message in report["messages"]))


if __name__ == "__main__":
    sys.exit(main())
