"""Add the page that encodes in a browser to a bundle: static files, for any web server.

ONNX Runtime comes from the npm package onnxruntime-web and is served beside the page, not from elsewhere. The page
loads what web.json names, and keeps it in the browser's cache under its hash.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from export.manifest import describe_files
from vlv.common.command import Misuse
from vlv.common.files import link_file, write_json

ORT_WEB = "1.30.0"  # the version that the page is tested with
INSTALL = f"npm install onnxruntime-web@{ORT_WEB}"
LIBRARY = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def require_library(package: Path) -> None:
    """Raise Misuse unless the folder is the npm package in the version that the page is written for."""
    try:
        found = json.loads((package / "package.json").read_text())["version"]
    except (OSError, ValueError, KeyError) as error:
        raise Misuse(f"{package} is not the npm package onnxruntime-web: {INSTALL}, then give its folder") from error
    if found != ORT_WEB:
        raise Misuse(f"{package} is onnxruntime-web {found}, expected {ORT_WEB}: {INSTALL}")


def write_page(bundle: Path, settings: dict[str, str], package: Path) -> None:
    """Write the folder web/ of a bundle that has its encoder and tokenizer. package: folder of onnxruntime-web."""
    web = bundle / "web"
    (web / "ort").mkdir(parents=True)
    for name in LIBRARY:
        link_file(package / "dist" / name, web / "ort" / name)
    for name in ("index.html", "style.css", "page.js"):
        source = resources.files(__package__).joinpath("web", name)
        (web / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    for file in (*sorted(bundle.glob("encoder.onnx*")), bundle / "tokenizer.json"):
        link_file(file, web / file.name)
    loaded = [f"ort/{LIBRARY[-1]}", *sorted(file.name for file in web.glob("encoder.onnx*")), "tokenizer.json"]
    write_json(web / "web.json", {"settings": settings, "files": describe_files(web, loaded)})
