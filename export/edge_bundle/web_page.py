"""Add the page that encodes in a browser to a bundle: static files, for any web server.

ONNX Runtime comes from the npm package onnxruntime-web and is served beside the page, not from elsewhere. The page
loads what web.json names, and keeps it in the browser's cache under its hash.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import onnx
from onnx import ModelProto

from export.manifest import describe_files
from vlv.common.command import Misuse
from vlv.common.files import link_file, write_json

ORT_WEB = "1.30.0"  # the version that the page is tested with
INSTALL = f"npm install onnxruntime-web@{ORT_WEB}"
LIBRARY = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GPU_LIBRARY = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
PAGE = ("index.html", "style.css", "page.js")
ENCODER = "encoder.js"  # also of the server's own page
GRAPHS = ("crop.onnx", "encoder.onnx")  # apart, because GPU_LIBRARY has no float64, which the crop needs
CHECK = "landscape"  # of the test vectors: what WebGPU has to give before it is used


def require_library(package: Path) -> None:
    """Raise Misuse unless the folder is the npm package in the version that the page is written for."""
    try:
        found = json.loads((package / "package.json").read_text())["version"]
    except (OSError, ValueError, KeyError) as error:
        raise Misuse(f"{package} is not the npm package onnxruntime-web: {INSTALL}, then give its folder") from error
    if found != ORT_WEB:
        raise Misuse(f"{package} is onnxruntime-web {found}, expected {ORT_WEB}: {INSTALL}")


def write_graphs(bundle: Path, crop: ModelProto, encoder: ModelProto) -> None:
    """Write the graphs that the page runs one after the other; the encoder's weights may be in a file of the bundle."""
    (bundle / "web").mkdir()
    for name, graph in zip(GRAPHS, (crop, encoder), strict=True):
        onnx.save(graph, bundle / "web" / name)


def write_page(bundle: Path, settings: dict[str, str], source: str, webgpu: bool, package: Path) -> None:
    """Complete the folder web/ of a bundle that has tokenizer and test vectors; `write_graphs` has begun it.

    source: hash of the checkpoint's encoder; webgpu: use it where a browser has it; package: folder of onnxruntime-web.
    """
    web = bundle / "web"
    (web / "ort").mkdir()
    library = LIBRARY + (GPU_LIBRARY if webgpu else ())
    for name in library:
        link_file(package / "dist" / name, web / "ort" / name)
    for name in (*PAGE, ENCODER):
        text = resources.files(__package__).joinpath("web", name).read_text(encoding="utf-8")
        (web / name).write_text(text, encoding="utf-8")
    vector = bundle / "vectors" / CHECK
    loaded = {file.name: file for file in (*sorted(bundle.glob("encoder.onnx.*")), bundle / "tokenizer.json")}
    if webgpu:
        loaded |= {"check.ppm": vector / "crop.ppm", "check.f32": vector / "embeddings.f32"}
    for name, file in loaded.items():
        link_file(file, web / name)
    names = [*GRAPHS, *loaded, *(f"ort/{name}" for name in library if name.endswith(".wasm"))]
    content = {
        "settings": settings,
        "source": source,
        "webgpu": webgpu,
        "modules": [ENCODER, *(f"ort/{name}" for name in library if name.endswith(".mjs"))],
        "files": describe_files(web, names),
    }
    write_json(web / "web.json", content)
