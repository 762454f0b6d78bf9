"""Caption images on this device: python caption.py IMAGE… (--check reproduces the test vectors)

Needs the files beside it, and onnxruntime, numpy, pillow, tokenizers and xllamacpp in the versions of requirements.txt.
Prints one JSON object per image: {"image": …, "caption": …}. Errors go to stderr; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageCms, ImageOps
from tokenizers import Tokenizer

LLAMA = "2026.10.11549"  # of xllamacpp: llama.cpp's structs below change without notice, so no other version is used


class ModelParams(Structure):
    """llama_model_params: 80 bytes, of which only the defaults are used."""

    _fields_ = [("all", c_void_p * 10)]


class ContextParams(Structure):
    """llama_context_params: the fields that are set, and the 128 bytes of the rest."""

    _fields_ = [(name, c_uint32) for name in "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max".split()]
    _fields_ += [("n_outputs_max_per_seq", c_uint32), ("n_threads", c_int32), ("n_threads_batch", c_int32)]
    _fields_ += [("ctx_type", c_int32), ("rest", c_void_p * 16)]


class Batch(Structure):
    """llama_batch. Null positions and sequences mean: the next ones of sequence 0, logits of the last token."""

    _fields_ = [("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", c_void_p)]
    _fields_ += [("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", c_void_p)]


def load_llama() -> ctypes.CDLL:
    """Load llama.cpp from the xllamacpp package. Raises RuntimeError for another version."""
    found = [one.version for one in importlib.metadata.distributions(name="xllamacpp")][:1]
    if found != [LLAMA]:
        raise RuntimeError(f"xllamacpp {LLAMA} is needed, found {found}: pip install --no-deps xllamacpp=={LLAMA}")
    folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
    lib = ctypes.CDLL(str(folder / "xllamacpp.abi3.so"))
    for name in "llama_model_load_from_file llama_init_from_model llama_model_get_vocab llama_get_memory".split():
        getattr(lib, name).restype = c_void_p
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_context_default_params.restype = ContextParams
    lib.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
    lib.llama_init_from_model.argtypes = [c_void_p, ContextParams]
    lib.llama_decode.argtypes = [c_void_p, Batch]
    lib.llama_get_logits_ith.argtypes = [c_void_p, c_int32]
    lib.llama_get_logits_ith.restype = POINTER(c_float)
    lib.llama_memory_clear.argtypes = [c_void_p, c_bool]
    for name in ("llama_model_get_vocab", "llama_get_memory", "llama_vocab_n_tokens", "llama_model_n_embd"):
        getattr(lib, name).argtypes = [c_void_p]
    return lib


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda level, text, data: None)  # llama.cpp's own log


class Captioner:
    """Caption one image at a time: encoder.onnx gives embeddings, llm.gguf continues them with text."""

    def __init__(self, folder: Path, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # what a large photo took is given back
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # tiny numbers would be slow
        self.encoder = onnxruntime.InferenceSession(folder / "encoder.onnx", options, ["CPUExecutionProvider"])
        settings = self.encoder.get_modelmeta().custom_metadata_map
        _, self.queries, self.width = self.encoder.get_outputs()[1].shape
        self.end_tokens = {int(token) for token in settings["end_tokens"].split()}
        self.max_tokens, self.tolerance = int(settings["max_new_tokens"]), float(settings["tolerance"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.lib = load_llama()
        self.lib.llama_log_set(LOG, None)
        self.lib.llama_backend_init()
        file, params = folder / "llm.gguf", self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(os.fsencode(file), params)
        if not self.model or self.lib.llama_model_n_embd(self.model) != self.width:
            raise RuntimeError(f"{file} is no complete model that takes embeddings of width {self.width}")
        self.words = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        params = self.lib.llama_context_default_params()
        params.n_ctx = self.queries + self.max_tokens
        params.n_batch = params.n_ubatch = self.queries
        params.n_threads = params.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {params.n_ctx} tokens: is there too little memory?")

    def encode(self, image: np.ndarray) -> list[np.ndarray]:
        """Return the crop uint8 [1, 3, S, S] and the embeddings float32 [1, Q, H] of an image uint8 [H, W, 3] RGB."""
        return self.encoder.run(["crop", "embeddings"], {"image": image})

    def tokens(self, embeddings: np.ndarray) -> list[int]:
        """Return the most likely tokens after embeddings float32 [1, Q, H], up to an end token."""
        values = np.ascontiguousarray(embeddings, np.float32)
        if values.shape != (1, self.queries, self.width) or not np.isfinite(values).all():
            raise RuntimeError(f"embeddings {values.shape} must be finite, of shape (1, {self.queries}, {self.width})")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self._decode(Batch(n_tokens=self.queries, embd=values.ctypes.data_as(POINTER(c_float))))
        found: list[int] = []
        while len(found) < self.max_tokens:
            if found:
                self._decode(Batch(n_tokens=1, token=(c_int32 * 1)(found[-1])))
            logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.words,))
            found.append(int(logits.argmax()))
            if found[-1] in self.end_tokens:
                return found[:-1]
        return found

    def _decode(self, batch: Batch) -> None:
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp failed with code {code}")

    def text(self, tokens: list[int]) -> str:
        """Return the caption: cut at its last period, without repeated sentences."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False).strip()
        text = text[: text.rindex(".") + 1] if "." in text else text
        return " ".join(dict.fromkeys(re.split(r"(?<=[.!?])\s+", text)))


def read_image(file: str | Path) -> np.ndarray:
    """Return an image file as uint8 [H, W, 3]: upright (EXIF), in sRGB, transparency on white."""
    # no other format: Pillow's full list has some that start other programs
    with Image.open(file, formats="JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM".split()) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        elif profile := image.info.get("icc_profile"):
            srgb = ImageCms.createProfile("sRGB")
            with contextlib.suppress(ImageCms.PyCMSError):  # a damaged profile: the colours as they are
                image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def check(captioner: Captioner, folder: Path) -> list[str]:
    """Return which files changed, and how the results on the test vectors differ from those recorded."""
    files = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["files"]
    hashes = {name: hashlib.sha256(np.memmap(folder / name, np.uint8, "r")).hexdigest() for name in files}
    problems = [f"{name} is damaged: copy it again" for name in files if hashes[name] != files[name]["sha256"]]
    for case in sorted((folder / "vectors").iterdir()):
        crop, embeddings = captioner.encode(read_image(case / "image.png"))
        levels = np.abs(crop[0].transpose(1, 2, 0).astype(int) - read_image(case / "crop.ppm")).max()
        recorded = np.fromfile(case / "embeddings.f32", "<f4").reshape(embeddings.shape)
        error = np.abs(embeddings - recorded).max() / np.abs(recorded).max()
        tokens = captioner.tokens(embeddings)
        same = tokens == [int(token) for token in (case / "tokens.txt").read_text().split()]
        same = same and captioner.text(tokens) == (case / "caption.txt").read_text().rstrip("\n")
        found = f"crop off by {levels} of 255, embeddings by {error:.1e}, caption {'equal' if same else 'different'}"
        print(f"{case.name}: {found}", file=sys.stderr)
        if levels > 1 or not error <= captioner.tolerance or not same:
            problems.append(f"{case.name}: {found}; allowed: 1, {captioner.tolerance:.1e}, equal")
    return problems


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--check", action="store_true", help="compare with the test vectors in vectors/")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of the processor (all)")
    args = parser.parse_args()
    args.images or args.check or parser.error("give an IMAGE, or --check")
    folder = Path(__file__).resolve().parent
    try:
        captioner = Captioner(folder, args.threads)
        problems = check(captioner, folder) if args.check else []
    except Exception as error:  # ONNX Runtime and tokenizers raise their own
        hint = "" if isinstance(error, RuntimeError) else "; is the folder complete? Copy it again"
        sys.exit(f"error: {' '.join(str(error).split())}{hint}")
    for file in args.images:
        try:
            caption = captioner.text(captioner.tokens(captioner.encode(read_image(file))[1]))
        except Exception as error:  # of Pillow, ONNX Runtime or llama.cpp: the next image may be readable
            problems.append(f"{file}: {' '.join(str(error).split())}")
        else:
            print(json.dumps({"image": file, "caption": caption}, ensure_ascii=False), flush=True)
    sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
