"""Define what is exported: one graph per component, its batch profile, its opset and its tolerance.

| component      | takes                                           | gives                                          |
|----------------|-------------------------------------------------|------------------------------------------------|
| `encoder`      | pixels uint8 [B, 3, S, S]                       | context [B, N, C], prompts [B, N, H]           |
| `context_kv`   | context [B, N, C]                               | per cross-attention kv_i [B, 2, heads, N, d]   |
| `unet`         | latents [B, c, s, s], timestep [1], all kv_i    | prediction [B, c, s, s]                        |
| `vae_decoder`  | latents [B, c, s, s]                            | image [B, 3, S, S], 0 to 1                     |
| `vae_encoder`  | pixels uint8 [B, 3, S, S]                       | latents [B, c, s, s], the posterior's mode     |
| `text_encoder` | ids int32 [B, N]                                | context [B, N, C]                              |

Inputs and outputs are uint8, int32 or float32, whatever the precision inside. Imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RUNTIMES = ("torch", "onnx", "onnx-cuda", "onnx-trt", "trt", "rtx")  # see export/runtimes/factory.py
PRECISIONS = ("fp32", "fp16", "bf16", "mixed", "int8", "int8-static", "int8-trt", "fp8")
TORCH_PRECISIONS = ("fp32", "bf16", "fp8", "fp8-emulated")  # of PyTorch itself, see export/runtimes/torch.py
GGUF_TYPES = ("f32", "f16", "q8_0", "q4_k_m", "q4_0")  # of the language model for llama.cpp
DTYPES = ("uint8", "int32", "float32")  # of inputs and outputs
ORT_ONLY = ("int8", "int8-static")
QUANTIZED = (*ORT_ONLY, "int8-trt", "fp8")  # made from a float32 or float16 graph
CALIBRATED = ("int8-static", "int8-trt", "fp8")  # with measured ranges of activations
OLDEST_FP8 = 89  # compute capability of the first GPUs with 8-bit floats

# Unit roundoff of what a precision rounds its activations to. INT8 has one scale a tensor and 127 steps, for the
# weights and for the activations; FP8 has three bits behind the leading one, and half its roundoff is its RMS error.
ROUNDOFF = {
    "fp32": 2**-24, "fp16": 2**-11, "mixed": 2**-11, "bf16": 2**-8, "int8": 2**-7, "int8-static": 2**-7,
    "int8-trt": 2**-7, "fp8": 2**-5,
}  # fmt: skip
ROUNDINGS = 16  # results rounded in one block: two norms, four products, scores, softmax, activations, residuals


@dataclass(frozen=True)
class Batch:
    """The batch profile of a graph, in TensorRT's words: the sizes that it takes, and the one engines are tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self):
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes {self.min} <= {self.opt} <= {self.max} must ascend from 1")

    @classmethod
    def up_to(cls, largest: int, opt: int = 8) -> Batch:
        """Return the profile from 1 to `largest`."""
        return cls(1, min(opt, largest), largest)

    def times(self, factor: int) -> Batch:
        """Return the profile for `factor` rows per image; one row stays possible, for sampling without guidance."""
        return Batch(self.min, factor * self.opt, factor * self.max)

    @property
    def odd(self) -> tuple[int, ...]:
        """Return the sizes to check: the smallest, the largest, and uneven ones between."""
        sizes = {self.min, 3, self.opt - 1, self.max}
        return tuple(sorted(size for size in sizes if self.min <= size <= self.max))


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; `shape` is without the batch axis, which comes first unless `batched` is False."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    batched: bool = True

    def at(self, batch: int) -> tuple[int, ...]:
        """Return the shape at a batch size."""
        return (batch, *self.shape) if self.batched else self.shape


@dataclass(frozen=True)
class Component:
    """A row of the table above: the weights that it needs, and the rows of a batch per image."""

    name: str
    needs: str  # "encoder": encoder.safetensors; "t2i": the diffusers folder
    rows: int = 1  # guidance runs the conditional and the unconditional context in one batch
    ops: bool = False  # True: its module calls operations of kernels/, whose references a plain trace contains

    def profile(self, encoded: Batch, reconstructed: Batch) -> Batch:
        """Return the profile of its graph, from those of encoded and of reconstructed images."""
        return encoded if self.needs == "encoder" else reconstructed.times(self.rows)


COMPONENTS = {
    c.name: c
    for c in (
        Component("encoder", "encoder", ops=True),
        Component("text_encoder", "t2i"),
        Component("context_kv", "t2i", rows=2),
        Component("unet", "t2i", rows=2, ops=True),
        Component("vae_decoder", "t2i"),
        Component("vae_encoder", "t2i"),
    )
}


def opset(precision: str) -> int:
    """Return the opset: 20 parses everywhere, bfloat16 convolutions need 22, TensorRT-RTX fails at 23's Attention."""
    return 22 if precision == "bf16" else 20


def tolerance(precision: str, blocks: int, longest: int) -> float:
    """Return the largest RMS error of an output that a precision explains, relative to the output's RMS.

    Each of ROUNDINGS results a block is off by the precision's roundoff, and by the float32 accumulation of sums
    of `longest` terms; independent errors add up as the root of their number.
    """
    one = ROUNDOFF[precision] + 2**-24 * math.sqrt(longest)
    return one * math.sqrt(ROUNDINGS * blocks)


# The largest error, relative to the output's largest magnitude, against the RMS tolerance: the normal tail of a few
# million numbers is five standard deviations, and peak over RMS of the output itself is at least one.
PEAK = 5.0
