"""Make tests/data/official, the slim copy of the recorded outputs, from the full recording.

    python tests/data/slim.py ../shared/official tests/data/official

Left out: the rows of Florence-2's 51,289-word table that the prompt does not use (a test puts zeros
there), most of the pixel values and all but every 16th of the vision tower's tokens.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TOKEN_STEP = PIXEL_STEP = 16


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for folder in ("florence2", "text_encoder", "qwen"):
        (target / folder).mkdir(exist_ok=True)
        for file in (source / folder).iterdir():
            if (folder, file.name) != ("florence2", "tokenizer.json"):  # big, and the prompt's ids are known
                shutil.copyfile(file, target / folder / file.name)
    shutil.copyfile(source / "captions.json", target / "captions.json")
    recorded = np.load(source / "expected.npz")
    for i, crop in enumerate(recorded["crop"]):
        Image.fromarray(crop.transpose(1, 2, 0)).save(target / f"crop{i}.png", optimize=True)
    kept = {name: recorded[name] for name in recorded if name != "crop"}
    kept["pixel_values"] = kept["pixel_values"][:, :, ::PIXEL_STEP, ::PIXEL_STEP]
    for name in ("davit", "image_features"):
        kept[name] = kept[name][:, ::TOKEN_STEP]
    np.savez_compressed(target / "expected.npz", **kept)

    weights = torch.load(source / "model.pt", weights_only=True, mmap=True)
    table = weights["VLV_model.model.language_model.model.shared.weight"]
    slim = {name: tensor.clone() for name, tensor in weights.items() if len(table) not in tensor.shape}
    slim["prompt_rows"] = table[torch.from_numpy(recorded["input_ids"][0])]
    save_file(slim, target / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
