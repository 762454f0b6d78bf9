"""Write a CycloneDX list of what this Python environment holds: python deploy/docker/sbom.py >sbom.cdx.json

The images run it at the end of their build, so that the list is of what is really in them. The distributions'
own metadata is all that it reads.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import Distribution, distributions


def component(distribution: Distribution) -> dict:
    """A distribution as a CycloneDX component; the licence as its metadata states it."""
    name, version = distribution.metadata["Name"], distribution.version
    stated = distribution.metadata.get("License-Expression") or distribution.metadata.get("License") or ""
    licence = stated.strip().splitlines()[0] if stated.strip() else ""
    if not licence:
        classified = [c for c in distribution.metadata.get_all("Classifier") or [] if c.startswith("License ::")]
        licence = classified[0].split(" :: ")[-1] if classified else ""
    entry = {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name.lower()}@{version}"}
    return entry | ({"licenses": [{"license": {"name": licence}}]} if licence else {})


def main() -> int:
    found = {d.metadata["Name"].lower(): component(d) for d in distributions() if d.metadata["Name"]}
    components = [found[name] for name in sorted(found)]
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}
    json.dump(bom, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
