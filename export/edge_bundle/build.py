"""Write the edge bundle of a checkpoint, and check what is in it by captioning with it.

    build_bundle(BundleConfig(ckpt="assets/vlv-tiny", out=Path("bundle")), checkpoint)

| file                            | what it is                                                                     |
|---------------------------------|--------------------------------------------------------------------------------|
| `encoder.onnx`                  | image uint8 [H, W, 3] -> crop uint8 [1, 3, S, S], embeddings float32 [1, Q, H] |
| `llm.gguf`, `tokenizer.json`    | the language model, which continues the embeddings                             |
| `caption.py`, `requirements.txt`| a program with its packages                                                    |
| `caption.cpp`, `CMakeLists.txt` | the same for ONNX Runtime's and llama.cpp's C APIs                             |
| `vectors/`                      | images with the crops, embeddings, tokens and captions that both must give     |
| `web/`, if asked for            | a page that encodes in the browser and sends embeddings to `serve.gateway`     |
| `bundle.json`, `README.md`      | hashes, versions and figures; how images are prepared, in words and numbers    |
"""

from __future__ import annotations

import shutil
import string
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from export.builders.gguf import write_gguf
from export.builders.gguf_artifacts import GGUFConfig, export_gguf
from export.builders.onnx import ExportConfig, export_onnx, open_export
from export.edge_bundle.caption import Captioner
from export.edge_bundle.preprocess import crop_graph, with_crop
from export.edge_bundle.web_page import require_library, write_graphs, write_page
from export.manifest import Artifact, ArtifactError, describe_files
from export.runtimes.llama_library import PACKAGE, library
from vlv.checkpoints.folder import Checkpoint
from vlv.checkpoints.llm_folder import check_llm_folder, end_token_ids, read_json
from vlv.common.files import atomic_folder, link_file, write_json
from vlv.data import scenes
from vlv.data.decoding.crop import center
from vlv.data.image import MAX_PIXELS
from vlv.model.encoder import IMAGENET_MEAN, IMAGENET_STD

FORMAT = 1
MAX_NEW_TOKENS = 300  # as published; fewer where the language model has fewer positions
PACKAGES = ("onnxruntime", "numpy", "pillow", "tokenizers", PACKAGE)
PROGRAMS = ("caption.py", "caption.cpp", "CMakeLists.txt")
ORIENTATION, QUARTER_TURN = 0x0112, 6  # of EXIF: the stored image must be turned clockwise by 90 degrees
THREADS = 2


@dataclass(frozen=True)
class BundleConfig:
    """What to put into the bundle, and how it is verified."""

    ckpt: str  # the checkpoint's name on the command line
    out: Path
    precision: str = "fp32"  # of the encoder, fp32, fp16 or int8
    llm_type: str = "f16"  # of the language model, one of export.components.GGUF_TYPES
    verification_inputs: int = 8
    images: tuple[Path, ...] = ()  # photos to verify the encoder on first
    captions: bool = True  # compare greedy captions with transformers'
    scenes: int = 256  # held-out scenes whose captions the language model is verified on
    allow_drift: bool = False
    force: bool = False  # replace what is in `out`
    web: Path | None = None  # folder of the npm package onnxruntime-web, for the page that encodes in a browser


def build_bundle(config: BundleConfig, checkpoint: Checkpoint) -> dict:
    """Write the bundle and return the content of its bundle.json.

    `out` appears when everything is verified. Raises OutputExists, ArtifactError for an encoder that drifts,
    CheckpointError, GGUFError, LlamaError.
    """
    library()  # fail early without llama.cpp
    if config.web:
        require_library(config.web)
    check_llm_folder(checkpoint.llm)
    size = sum(file.stat().st_size for file in (checkpoint.encoder_file, *checkpoint.llm.glob("*.safetensors")))
    with atomic_folder(config.out, 3 * size, config.force) as folder:
        llm = _write_llm(config, checkpoint, folder)
        settings, encoder = _write_encoder(config, checkpoint, folder)
        link_file(checkpoint.llm / "tokenizer.json", folder / "tokenizer.json")
        pins = {name: version(name) for name in PACKAGES}
        (folder / "requirements.txt").write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()))
        for name in PROGRAMS:
            (folder / name).write_text(_packaged(name), encoding="utf-8")
        _write_vectors(folder)
        readme = string.Template(_packaged("README.md")).substitute(_described(config, checkpoint, settings, pins))
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if config.web:
            # WebGPU has no kernels for integers of 8 bits
            write_page(folder, settings, encoder.source, config.precision != "int8", config.web)
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        content = {
            "format": FORMAT,
            "settings": settings,
            "precision": config.precision,
            "encoder": {"source": encoder.source, "builder": encoder.builder, "verification": encoder.verification},
            "llm": llm,
            "requirements": pins,
            "files": describe_files(folder, names),
        }
        write_json(folder / "bundle.json", content)
    return content


def _write_llm(config: BundleConfig, checkpoint: Checkpoint, folder: Path) -> dict:
    """Write llm.gguf, verified unless `captions` is off; return what is known of it."""
    if not config.captions:
        return write_gguf(checkpoint.llm, folder / "llm.gguf", config.llm_type)
    work_dir = folder / "export"
    options = (config.ckpt, work_dir, (config.llm_type,), config.scenes, config.allow_drift)
    artifacts, problems = export_gguf(GGUFConfig(*options), checkpoint)
    if problems:
        raise ArtifactError("; ".join(problems))
    artifact = artifacts[0]
    (work_dir / artifact.main_file).rename(folder / "llm.gguf")
    shutil.rmtree(work_dir)
    return {
        "kind": config.llm_type,
        "source": artifact.source,
        "builder": artifact.builder,
        "verification": artifact.verification,
    }


def _write_encoder(config: BundleConfig, checkpoint: Checkpoint, folder: Path) -> tuple[dict[str, str], Artifact]:
    """Export and verify the encoder, put the crop before it; return the settings in its metadata, and its entry."""
    work_dir = folder / "export"
    export_config = ExportConfig(
        ckpt=config.ckpt,
        out=work_dir,
        components=("encoder",),
        precision=config.precision,
        max_batch=1,
        verification_inputs=config.verification_inputs,
        images=config.images,
        captions=config.captions,
        allow_drift=config.allow_drift,
    )
    with open_export(export_config, checkpoint) as export:
        report = export_onnx(export)
    if report.problems:
        raise ArtifactError("; ".join(report.problems))
    artifact = report.artifacts[0]
    model = checkpoint.config
    positions = read_json(checkpoint.llm / "config.json")["max_position_embeddings"]
    settings = {
        "image_size": str(model.image_size),
        "queries": str(model.queries),
        "width": str(model.llm_width),
        "end_tokens": " ".join(map(str, end_token_ids(checkpoint.llm))),
        "max_new_tokens": str(min(MAX_NEW_TOKENS, positions - model.queries)),
        "tolerance": f"{artifact.verification['allowed']['max']:.1e}",
    }
    graph, *weights = artifact.files
    encoder = onnx.load(work_dir / graph, load_external_data=False)
    onnx.save(with_crop(encoder, settings), folder / "encoder.onnx")
    if config.web:
        write_graphs(folder, crop_graph(model.image_size, ir_version=encoder.ir_version), encoder)
    for name in weights:
        (work_dir / name).rename(folder / name)
    shutil.rmtree(work_dir)
    return settings, artifact


def _packaged(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _write_vectors(folder: Path) -> None:
    """Write the test vectors: a landscape image, and an upscaled portrait that is stored turned by 90 degrees.

    The crops are Pillow's, the rest is what the bundle's own graph and language model give here. Raises ArtifactError
    where the graph's crop differs from Pillow's by more than one grey level.
    """
    captioner = Captioner(folder, THREADS)
    size = int(captioner.encoder.get_modelmeta().custom_metadata_map["image_size"])
    shapes = {"landscape": (4 * size, 3 * size - 1), "turned": (size - size // 4 - 1, size + size // 8)}
    for number, (name, shape) in enumerate(shapes.items()):
        case = folder / "vectors" / name
        case.mkdir(parents=True)
        scene = Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + 3 * 10**6 + number)))
        image = scene.resize(shape, Image.Resampling.BICUBIC)
        crop = center(image, size, MAX_PIXELS)
        found, embeddings = captioner.encode(np.asarray(image))
        if (levels := np.abs(found[0].transpose(1, 2, 0) - np.asarray(crop, int)).max()) > 1:
            raise ArtifactError(f"{name}: the crop of the graph is off by {levels} grey levels from Pillow's")
        tokens = captioner.tokens(embeddings)
        exif = Image.Exif()
        if name == "turned":
            exif[ORIENTATION] = QUARTER_TURN
        stored = image.transpose(Image.Transpose.ROTATE_90) if name == "turned" else image
        stored.save(case / "image.png", exif=exif)
        image.save(case / "image.ppm")
        crop.save(case / "crop.ppm")
        embeddings.astype("<f4").tofile(case / "embeddings.f32")
        (case / "tokens.txt").write_text(" ".join(map(str, tokens)) + "\n")
        (case / "caption.txt").write_text(captioner.text(tokens) + "\n", encoding="utf-8")


def _described(
    config: BundleConfig, checkpoint: Checkpoint, settings: dict[str, str], pins: dict[str, str]
) -> dict[str, object]:
    """Return the values that the README names."""
    size = checkpoint.config.image_size
    return {
        **settings,
        "ckpt": checkpoint.folder.name,
        "precision": config.precision,
        "llm_type": config.llm_type,
        "target": size * checkpoint.config.upsample,
        "mean": ", ".join(map(str, IMAGENET_MEAN)),
        "std": ", ".join(map(str, IMAGENET_STD)),
        "extreme": f"{MAX_PIXELS // size**2:,}",
        **{f"{name}_pin": pin for name, pin in pins.items()},
    }
