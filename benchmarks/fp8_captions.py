"""The captions that 8-bit floats in PyTorch keep: python -m benchmarks.fp8_captions

Greedy captions of 512 scenes by the bundled checkpoint, from embeddings with the vision tower in 8-bit floats, as
`--precision fp8` has it, beside those with other blocks left exact: the candidates of INT8's rule
(export/quantize/precision.py), and the tower with BART's encoder. All compared with float32 PyTorch. On a CPU the 8-bit
values are multiplied in float32, and once in bfloat16, which a GPU computes the rest in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.export_cpu import BUNDLED, SCENES, SEED
from export.graphs import Graph, load
from export.quantize.fp8 import exact_blocks, to_fp8
from export.quantize.precision import block_costs, exclusion_candidates
from export.runtimes.torch import TorchRuntime
from export.verification.captions import Captions
from export.verification.inputs import NOISE, VerificationInputs
from export.verification.verifier import compare
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import command_line

BATCH = 64  # images encoded together


def measure(checkpoint: Checkpoint, images: Tensor) -> list[dict]:
    """Return a row per choice of exact blocks: error of the embeddings, tokens kept and their standard error."""
    reference = TorchRuntime(checkpoint, "cpu")
    captions, expected = Captions(checkpoint, reference, images), reference.encode(images)
    costs = block_costs(reference.session("encoder").graph)
    tower = exact_blocks(reference.session("encoder").graph)
    choices = {
        "the vision tower alone": tower,
        "the vision tower and BART's encoder": tuple(b for b in tower if "bottleneck.encoder" not in b),
        **{f"INT8's rule, candidate {i}": blocks for i, blocks in enumerate(exclusion_candidates(costs))},
    }
    cases = [(name, blocks, torch.float32) for name, blocks in choices.items()]
    cases += [("the vision tower alone", tower, torch.bfloat16), ("nothing", tuple(costs), torch.bfloat16)]
    rows = []
    for name, blocks, dtype in cases:
        graph = to_fp8(load(checkpoint, "encoder").cast(dtype), blocks)

        def encode(images: Tensor, graph: Graph = graph) -> Tensor:
            return torch.cat([graph(part)[1] for part in images.split(BATCH)])

        with torch.inference_mode():
            found = captions.agreement(encode, 0.99, more=False)
            error = compare(encode(images), expected)
        row = {"in 8 bits": name, "dtype": str(dtype).removeprefix("torch."), "exact_blocks": len(blocks)}
        row |= {"rms": error["rms"], "agreement": found.agreement, "standard_error": found.error}
        rows.append(row | {"images": found.images, "tokens": found.tokens})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"images ({SCENES})")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/fp8_captions.json"))
    args = parser.parse_args()
    checkpoint, about = Checkpoint.open(BUNDLED), machine.describe()
    images = VerificationInputs(checkpoint, args.scenes + NOISE, seed=SEED).images[:-NOISE]
    rows = measure(checkpoint, images)
    result = {"command": command_line("benchmarks.fp8_captions"), "machine": about, "runs": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
