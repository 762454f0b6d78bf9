"""The edge bundle: a crop equal to Pillow's, and programs that caption without this package as transformers does."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
import torch
from PIL import Image

from export.edge_bundle import preprocess
from export.verification.inputs import border_images
from tests.export.conftest import BUNDLED
from vlv.data.decoding.crop import center
from vlv.data.image import MAX_PIXELS, load_crop
from vlv.model.captioner import Captioner

ROOT = Path(__file__).parents[2]
PACKAGES = {"onnxruntime", "numpy", "PIL", "tokenizers"}  # and xllamacpp, whose library is loaded by its path
ORDER = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 1  # older versions resize in another order: one grey level
# width, height: landscape, portrait, upscaled, one pixel high or wide, an odd excess on each side of a half
SHAPES = [
    (640, 480),
    (333, 77),
    (77, 333),
    (37, 91),
    (100, 1),
    (1, 300),
    (1, 1),
    (64, 64),
    (63, 64),
    (66, 64),
    (67, 64),
]
SHAPES += [(69, 64), (64, 71), (1999, 1501), (3001, 2)]


@pytest.fixture(scope="module")
def crop_of():
    """Return the crop that the graph gives of an image [H, W, 3], as [S, S, 3]."""
    sessions = {}

    def crop(image: np.ndarray, size: int) -> np.ndarray:
        if size not in sessions:
            model = preprocess.crop_graph(size)
            onnx.checker.check_model(model, full_check=True)
            sessions[size] = onnxruntime.InferenceSession(model.SerializeToString())
        return sessions[size].run(None, {"image": image})[0][0].transpose(1, 2, 0)

    return crop


def differences(crop: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Grey levels between a crop and Pillow's."""
    expected = center(Image.fromarray(image), crop.shape[0], MAX_PIXELS)
    return np.abs(crop.astype(int) - np.asarray(expected, int))


@pytest.mark.parametrize("size", [64, 384])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_crop_is_pillows(crop_of, shape, size):
    image = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    assert differences(crop_of(image, size), image).max() <= ORDER


def test_the_crop_at_the_borders(crop_of):
    """Frames of one pixel, where taps beyond the border would show."""
    for image in border_images(200).numpy().transpose(0, 2, 3, 1):
        image = np.ascontiguousarray(image)
        assert differences(crop_of(image, 64), image).max() <= ORDER


@pytest.mark.parametrize("shape", [(50_001, 1), (1, 50_003), (50_000, 2), (3, 200_001), (2, 99_998)], ids=str)
def test_an_extreme_aspect_ratio(crop_of, shape):
    """Resized as a whole it would have more than 200 million pixels: the central square alone is."""
    image = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    assert differences(crop_of(image, 64), image).max() <= ORDER


def test_random_sizes(crop_of):
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 300, (100, 2)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        assert differences(crop_of(image, 64), image).max() <= ORDER, (width, height)


def test_weights_in_a_file_of_their_own(artifacts, tmp_path):
    """They are not read, and the graph finds them."""
    onnx.save(
        onnx.load(artifacts / "encoder.onnx"),
        tmp_path / "encoder.onnx",
        save_as_external_data=True,
        location="encoder.onnx.data",
    )
    plain = onnx.load(tmp_path / "encoder.onnx", load_external_data=False)
    onnx.save(preprocess.with_crop(plain, {"queries": "32"}), tmp_path / "encoder.onnx")
    assert (tmp_path / "encoder.onnx").stat().st_size < 10**6
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    assert session.get_modelmeta().custom_metadata_map == {"queries": "32"}
    file = ROOT / "assets" / "samples" / "scene-00107.png"
    crop, embeddings = session.run(None, {"image": np.asarray(Image.open(file).convert("RGB"))})
    assert (crop[0] == load_crop(file, crop.shape[-1])).all()
    expected = onnxruntime.InferenceSession(artifacts / "encoder.onnx").run(["prompts"], {"pixels": crop})[0]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def export(out: Path, *args: str) -> int:
    from export import edge

    try:
        return edge.main(["--ckpt", str(BUNDLED), "--out", str(out), "--no-captions", "--probes", "4", *args])
    except SystemExit as exit:
        return exit.code


def require_llama() -> None:
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package, reason="pip install --no-deps gguf==0.19.0 xllamacpp==2026.10.11549")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    require_llama()
    out = tmp_path_factory.mktemp("edge") / "bundle"
    assert export(out) == 0
    return out


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    """The same, to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def caption(bundle: Path, *args: str | Path) -> subprocess.CompletedProcess:
    """Run the bundle's program by itself, outside of this repository."""
    command = [sys.executable, str(bundle / "caption.py"), "--threads", "1", *map(str, args)]
    return subprocess.run(command, cwd=bundle.parent, capture_output=True, text=True, timeout=120)


def test_what_is_in_the_bundle(bundle, checkpoint):
    content = json.loads((bundle / "bundle.json").read_text())
    files = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    assert files == set(content["files"]) | {"bundle.json"}
    for name, entry in content["files"].items():
        data = (bundle / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"])
    assert not content["encoder"]["verification"]["problems"]
    assert content["llm"]["kind"] == "f16" and content["precision"] == "fp32"
    settings = onnxruntime.InferenceSession(bundle / "encoder.onnx").get_modelmeta().custom_metadata_map
    assert settings == content["settings"]
    assert settings["queries"] == str(checkpoint.config.queries) and settings["end_tokens"] == "0"
    assert float(settings["tolerance"]) < 1e-3
    pins = dict(line.split("==") for line in (bundle / "requirements.txt").read_text().split())
    assert pins == content["requirements"] and pins.keys() == {"pillow", "xllamacpp", *PACKAGES - {"PIL"}}


def test_the_readme_has_this_models_numbers(bundle, checkpoint):
    text, size = (bundle / "README.md").read_text(), checkpoint.config.image_size
    assert "$" not in text
    for number in (f"{size} x {size} pixels", f"Upsample to {size * checkpoint.config.upsample} x", "0.485, 0.456"):
        assert number in text


def test_the_program_is_small_and_needs_five_packages(bundle):
    source = (bundle / "caption.py").read_text()
    assert len(source.splitlines()) <= 200
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    top = {name.split(".")[0] for name in names}
    assert top - sys.stdlib_module_names == PACKAGES


def test_the_program_reproduces_the_vectors(bundle):
    run = caption(bundle, "--check")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("caption equal") == 2 and not run.stdout


@pytest.mark.parametrize("damage", ["crop.ppm", "embeddings.f32", "tokens.txt", "caption.txt", "image.png"])
def test_a_difference_from_the_vectors_is_seen(copied, damage):
    file = copied / "vectors" / "turned" / damage
    if damage.endswith((".ppm", ".png")):
        Image.fromarray(np.asarray(Image.open(file)) ^ 8).save(file)  # and the image's EXIF is gone
    elif damage == "embeddings.f32":
        values = np.fromfile(file, "<f4")
        values[7] += 0.01
        values.tofile(file)
    else:
        file.write_text(file.read_text().strip() + " 5\n")
    run = caption(copied, "--check")
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("error: turned:")


def test_captions_are_those_of_transformers(bundle, checkpoint):
    """float32 encoder, and a language model in float16, as its weights are stored: the captions of the reference."""
    files = sorted((ROOT / "assets" / "samples").glob("*.png"))
    run = caption(bundle, *files)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["image"] for line in found] == [str(file) for file in files]
    crops = np.stack([load_crop(file, checkpoint.config.image_size) for file in files])
    assert [line["caption"] for line in found] == Captioner.load(checkpoint).captions(torch.from_numpy(crops))


def test_images_as_devices_write_them(bundle, tmp_path):
    """Turned by EXIF, with transparency, in greys, with a palette: all give the caption of the upright RGB image."""
    scene = Image.open(ROOT / "assets" / "samples" / "scene-00103.png").convert("RGB").resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned anticlockwise by 90 degrees
    scene.save(tmp_path / "a.png")
    scene.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "b.png", exif=exif)
    rgba = scene.convert("RGBA")
    rgba.putalpha(255)
    rgba.save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"no image")
    run = caption(bundle, *(tmp_path / f"{name}.png" for name in "abcd"))
    captions = [json.loads(line)["caption"] for line in run.stdout.splitlines()]
    assert len(captions) == 3 and len(set(captions)) == 1
    assert run.returncode == 1 and run.stderr.startswith(f"error: {tmp_path / 'd.png'}: cannot identify")


def test_colours_of_a_profile_are_converted(bundle, tmp_path):
    """An image in a profile whose red and green are exchanged is seen as it looks, as vlv.data.image does."""
    from PIL import ImageCms

    from export.edge_bundle.caption import read_image

    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    srgb[red : red + 4], srgb[green : green + 4] = b"gXYZ", b"rXYZ"
    image = Image.new("RGB", (64, 64), (200, 30, 10))
    image.save(tmp_path / "swapped.png", icc_profile=bytes(srgb))
    found = read_image(tmp_path / "swapped.png")
    expected = load_crop(tmp_path / "swapped.png", 64).transpose(1, 2, 0)
    assert abs(found.astype(int) - expected).max() <= 1 and found[0, 0, 1] > found[0, 0, 0] + 100


def test_the_memory_that_a_photo_takes(bundle, tmp_path):
    """12 megapixels are 36 MB as bytes; decoder, array and crop must not have a copy each, nor one of every photo."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BILINEAR).save(tmp_path / "photo.jpg")
    program = [sys.executable, str(bundle / "caption.py"), "--threads", "1", *[str(tmp_path / "photo.jpg")] * 3]
    # the peak counts what the process that starts another one has, so that is a small one, not this one
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    measure += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    run = subprocess.run([sys.executable, "-c", measure, *program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 340_000  # KiB; of a small image 120,000


def test_another_llama_cpp_is_refused(bundle, copied):
    source = (copied / "caption.py").read_text()
    (copied / "caption.py").write_text(source.replace('LLAMA = "2026.', 'LLAMA = "2027.'))
    run = caption(copied, "--check")
    assert run.returncode == 1
    assert run.stderr.startswith("error: xllamacpp 2027.") and "found ['2026." in run.stderr


def test_a_damaged_language_model(copied):
    (copied / "llm.gguf").write_bytes((copied / "llm.gguf").read_bytes()[:100_000])
    run = caption(copied, "--check")
    assert run.returncode == 1 and "is no complete model" in run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_a_damaged_file_is_named(copied):
    """One byte of a weight changes no caption, and is found; what does not load is one sentence."""
    content = bytearray((copied / "llm.gguf").read_bytes())
    content[-100] ^= 1
    (copied / "llm.gguf").write_bytes(content)
    run = caption(copied, "--check")
    assert run.returncode == 1 and "error: llm.gguf is damaged: copy it again" in run.stderr.splitlines()
    for name, words in {
        "vectors/turned/embeddings.f32": "embeddings.f32",
        "tokenizer.json": "Model missing",
        "encoder.onnx": "Protobuf parsing failed",
    }.items():
        (copied / name).write_text("{}") if name.startswith(("tok", "enc")) else (copied / name).unlink()
        run = caption(copied, "--check")
        assert run.returncode == 1 and run.stderr.startswith("error: ") and words in run.stderr
        assert run.stderr.endswith("; is the folder complete? Copy it again\n") and run.stderr.count("\n") == 1


def test_an_existing_folder_is_kept(bundle, capsys):
    assert export(bundle) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert export(bundle, "--llm-type", "q3") == 2


@pytest.mark.parametrize(
    "precision, llm_type", [("int8", "q8_0"), pytest.param("fp16", "q4_0", marks=pytest.mark.slow)]
)
def test_smaller_bundles(bundle, tmp_path, precision, llm_type):
    out = tmp_path / "small"
    assert export(out, "--precision", precision, "--llm-type", llm_type) == 0
    for name in ("encoder.onnx", "llm.gguf"):
        assert (out / name).stat().st_size < 0.6 * (bundle / name).stat().st_size or name == "llm.gguf"
    run = caption(out, "--check", ROOT / "assets" / "samples" / "scene-00107.png")
    assert run.returncode == 0, run.stderr
    assert "sailboat" in json.loads(run.stdout)["caption"]


def test_the_program_in_cpp(bundle, tmp_path):
    """Built with system packages, or those below CMAKE_PREFIX_PATH, and held against the same vectors."""
    build = tmp_path / "build"
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("no C++ compiler or no cmake: apt install g++ cmake")
    configure = subprocess.run(["cmake", "-S", bundle, "-B", build], capture_output=True, text=True)
    if configure.returncode and "Could not find" in configure.stderr:
        pytest.skip("no headers of ONNX Runtime or llama.cpp: apt install libonnxruntime-dev libllama-dev")
    assert configure.returncode == 0, configure.stderr
    made = subprocess.run(["cmake", "--build", build], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    program = build / "caption"
    run = subprocess.run([program, bundle, "--check"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr.count("caption equal") == 2, run.stderr
    image = bundle / "vectors" / "turned" / "image.ppm"
    run = subprocess.run([program, bundle, image, bundle / "README.md"], capture_output=True, text=True)
    assert run.stdout == (image.parent / "caption.txt").read_text()
    assert run.returncode == 1 and "README.md is not a complete binary PPM" in run.stderr
    values = np.fromfile(image.parent / "embeddings.f32", "<f4")
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    (values * 1.1).tofile(other / "vectors" / "turned" / "embeddings.f32")
    assert subprocess.run([program, other, "--check"], capture_output=True).returncode == 1
