"""Captions through an exported encoder: the same as PyTorch's, and refused where it does not belong."""

from __future__ import annotations

import json
import os
import threading

import torch

from serve.vllm_caption import main
from tests.export.conftest import BUNDLED


def caption(tmp_path, name: str, images, *args) -> tuple[int, dict[str, str]]:
    output = tmp_path / f"{name}.jsonl"
    flags = ["--engine", "transformers", "--workers", "1", "--raw", "--max-tokens", "48", "--prompt-batch", "8"]
    code = main([str(images), "--ckpt", str(BUNDLED), "-o", str(output), *flags, *map(str, args)])
    for thread in threading.enumerate():  # a run that failed goes on loading, and changes torch's default dtype
        if thread.name.startswith("llm"):
            thread.join(60)
    lines = output.read_text().splitlines() if output.exists() else []
    return code, {r["id"]: (r["caption"], r["tokens"]) for r in map(json.loads, lines)}


def test_captions_are_pytorchs(artifacts, scene_images, tmp_path):
    """64 held-out pictures, greedy: every caption the same, through batches larger than the graph takes."""
    code, expected = caption(tmp_path, "torch", scene_images)
    assert code == 0 and len(set(expected.values())) > 1
    assert caption(tmp_path, "onnx", scene_images, "--encoder", "onnx", "--artifacts", artifacts) == (0, expected)
    code, rounded = caption(tmp_path, "fp8", scene_images, "--precision", "fp8-emulated")
    assert code == 0 and sum(rounded[image] == expected[image] for image in expected) >= 60


def test_what_does_not_belong_is_refused(copied, scene_images, tmp_path, capsys):
    image = scene_images / "00.png"
    assert caption(tmp_path, "a", image, "--encoder", "onnx")[0] == 2
    assert "an exported encoder needs both" in capsys.readouterr().err
    assert caption(tmp_path, "b", image, "--artifacts", copied)[0] == 2
    assert caption(tmp_path, "c", image, "--encoder", "onnx", "--artifacts", tmp_path)[0] == 2
    assert "--artifacts: no artifacts in" in capsys.readouterr().err
    assert caption(tmp_path, "d", image, "--encoder", "rtx", "--artifacts", copied)[0] == 1
    if not torch.cuda.is_available():
        assert caption(tmp_path, "f", image, "--precision", "fp8")[0] == 1
        assert "--precision fp8 needs a GPU that multiplies 8-bit floats" in capsys.readouterr().err
    os.truncate(copied / "encoder.onnx", 10)
    assert caption(tmp_path, "e", image, "--encoder", "onnx", "--artifacts", copied)[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "make it again: python -m export.onnx" in error
