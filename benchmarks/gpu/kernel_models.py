"""The whole encoder, and a step of SD 2.1's UNet, for benchmarks.gpu.kernels."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.encoder_cpu import flops, prepared, random_images
from benchmarks.gpu.kernel_measure import OURS, THEIRS, Clock, eager_and_compiled, judge, line, summary
from benchmarks.published_encoder import PublishedEncoder
from export.components import tolerance
from export.graphs import EncoderGraph
from export.quantize.fp8 import to_fp8
from export.runtimes.cuda_graphs import BatchGraphs, CudaCapture
from kernels.fp8_linear import has_fp8
from kernels.runtime.dispatch import references
from vlv.checkpoints import random_weights
from vlv.model.config import PRESETS, DaViTConfig
from vlv.model.encoder import VLVEncoder

TOY = replace(
    PRESETS["tiny"],
    image_size=8,
    encoder_layers=1,
    decoder_layers=1,
    context_layers=1,
    vision=DaViTConfig((32,), (1,), (1,), (1,), (8,), (8,), (0,), (False,), 4),
)
TOY_UNET = {
    "block_out_channels": (32, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "sample_size": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
BATCHES = (1, 8, 64)  # besides the run's own
COMPILE = 90.0  # seconds, about, that compiling an encoder needs


class EncoderBench:
    """Ours against transformers' implementation of the published encoder, with the same random weights."""

    def __init__(self, contest):
        self.contest = contest
        self.clock: Clock = contest.clock
        self.toy = contest.toy
        self.config = TOY if self.toy else PRESETS["qwen2.5-3b"]
        self.eight: EncoderGraph | None = None  # the encoder in 8-bit floats
        self.times: dict[str, float] = {}
        self.errors: dict = {}

    def check(self) -> bool:
        """Build both encoders and compare them with float32 of the same rounded weights."""
        with torch.device("cpu"):
            ours = random_weights.encoder(self.config, self.contest.dtype)
        exact = VLVEncoder(self.config).eval()
        exact.load_state_dict(ours.state_dict())
        self.pixels = random_images(self.config, self.contest.batch).to(self.clock.device)
        with references():
            self.expected = exact.to(self.clock.device)(self.pixels[:2])
        del exact
        self.ours = ours.to(self.clock.device)
        self.published = PublishedEncoder(self.ours, "sdpa").to(self.clock.device)
        self.inputs = prepared(self.ours, self.pixels)
        self.errors = judge(self.ours(self.pixels)[:2], self.published(self.inputs)[:2], self.expected)
        self.contest.report.add("checks", {"name": "encoder", **self.errors})
        return self.errors["correct"]

    def eager(self) -> None:
        """Time our encoder as it is in kernels/tuned.json, and its references."""
        self._time("ours eager before tuning" if self.contest.tune else "ours eager", lambda: self.ours(self.pixels))
        with references():
            self._time("references eager", lambda: self.ours(self.pixels))

    def tuned(self) -> None:
        """Time our encoder after tuning."""
        self._time("ours eager", lambda: self.ours(self.pixels))

    def batches(self) -> None:
        """Time our encoder at other batches."""
        for batch in () if self.toy else BATCHES:
            pixels = random_images(self.config, batch).to(self.clock.device)
            self._time(f"ours eager batch {batch}", lambda pixels=pixels: self.ours(pixels))

    def graphs(self) -> bool:
        """Check and time our encoder in CUDA graphs; in a dry run a replay calls it again."""
        return self._graphs("ours graph", lambda x: (self.ours(x),), limit=0.0)

    def fp8(self) -> bool:
        """Check and time our encoder in 8-bit floats, as it is and in CUDA graphs; a dry run emulates them."""
        if not (self.toy or has_fp8(self.pixels.device)):
            return True
        self.eight = to_fp8(EncoderGraph(copy.deepcopy(self.ours)))
        allowed = tolerance("fp8", len(self.eight.blocks), self.eight.longest_sum)
        errors = judge(self.eight(self.pixels)[1][:2], self.published(self.inputs)[:2], self.expected, allowed)
        self.contest.report.add("checks", {"name": "encoder fp8", **errors})
        if not errors["correct"]:
            return False
        self._time("fp8 eager", lambda: self.eight(self.pixels))
        return self._graphs("fp8 graph", lambda x: (self.eight(x)[1],), limit=allowed)

    def _graphs(self, name: str, call: Callable[[Tensor], tuple[Tensor, ...]], limit: float) -> bool:
        if not self.contest.time.allows(0 if self.toy else 10, f"encoder, {name}"):
            return True
        capture = Recapture() if self.toy else CudaCapture(self.pixels.device)
        graphed = BatchGraphs(call, self.pixels[:1], self.contest.batch, capture)
        errors = judge(graphed(self.pixels)[0][:2], self.published(self.inputs)[:2], self.expected, limit)
        errors |= {"name": f"encoder, {name}", "graphs": graphed.sizes, "memory_bytes": graphed.memory_bytes}
        self.contest.report.add("checks", errors)
        for batch in (self.contest.batch, 1, *(() if self.toy else (8, 3, 64))):
            pixels = random_images(self.config, batch).to(self.clock.device)
            suffix = "" if batch == self.contest.batch else f" batch {batch}"
            self._time(name + suffix, lambda pixels=pixels: graphed(pixels))
        return errors["correct"]

    def theirs(self) -> None:
        """Time transformers' encoder, eager."""
        self._time("eager", lambda: self.published(self.inputs))

    def compiled(self) -> None:
        """Time both encoders under torch.compile."""
        rivals = (("ours compiled", self.ours, self.pixels), ("compile", self.published, self.inputs))
        for name, model, x in rivals:
            if self.toy:  # a dry run compiles nothing
                self._time(name, lambda model=model, x=x: model(x))
            elif self.contest.time.allows(COMPILE, f"encoder, {name}"):
                torch._dynamo.reset()
                fast = torch.compile(model)
                self._time(name, lambda fast=fast, x=x: fast(x))

    def profile(self) -> None:
        """Record the GPU time of every kernel in one pass of our encoder, and in one by 8-bit floats."""
        if self.toy:
            return
        activities = [torch.profiler.ProfilerActivity.CUDA]
        for name, model in (("profile", self.ours), ("profile_fp8", self.eight)):
            if model is None:
                continue
            with torch.profiler.profile(activities=activities) as record:
                model(self.pixels)
                torch.cuda.synchronize()
            table = [
                {"kernel": event.key, "calls": event.count, "milliseconds": event.self_device_time_total / 1e3}
                for event in record.key_averages()
            ]
            self.contest.report.content[name] = sorted(table, key=lambda one: -one["milliseconds"])[:40]
            self.contest.report.write()

    def result(self) -> bool:
        """Add our best against the best rival; return False if the encoder is wrong."""
        full = {name: ms for name, ms in self.times.items() if "batch" not in name}
        times = {name: ms for name, ms in full.items() if not name.startswith(("ref", "fp8"))}
        eight = [ms for name, ms in full.items() if name.startswith("fp8")]
        result = {"name": "encoder", **self.errors}
        if self.errors["correct"] and {"eager"} & set(times) and any(name.startswith("ours") for name in times):
            floor = flops(self.config, self.contest.batch) / self.contest.limits["flops_per_s"] * 1e3
            result = summary(result, times, floor, target=2.0) | {
                "images_per_s": self.contest.batch
                / min(ms for name, ms in times.items() if name.startswith("ours"))
                * 1e3,
                "images_per_s_target": 330,
                "ceiling_target": 0.75,
            }
            if eight:
                result |= {"fp8_speedup": result["milliseconds"]["ours"] / min(eight), "fp8_speedup_target": 1.4}
        print(line(self.contest.report.add("results", result), figures=not self.toy), flush=True)
        return self.errors["correct"]

    def _time(self, name: str, call: Callable[[], object], **more: float) -> None:
        if not self.errors["correct"] or not self.contest.time.allows(0 if self.toy else 2, f"encoder, {name}"):
            return
        self.times[name] = self.clock(call)
        self.contest.report.add("encoder", {"name": name, "milliseconds": self.times[name], **more})


class Recapture:
    """Stand for CudaCapture in a dry run: a replay calls again, into the memory of the first call's results."""

    def __call__(self, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        outputs = call()

        def replay() -> None:
            for held, new in zip(outputs, call(), strict=True):
                held.copy_(new)

        return replay, outputs

    in_turn = staticmethod(nullcontext)

    def memory(self) -> int:
        return 0


def unet(clock: Clock, limits: dict[str, float], dtype: torch.dtype, batch: int, toy: bool) -> dict:
    """Time one step of SD 2.1-base's UNet at 512 px with guidance (twice the batch), random weights.

    Returns {} where diffusers is not installed.
    """
    if not find_spec("diffusers"):
        print("no UNet step: diffusers is not installed (pip install diffusers)", file=sys.stderr)
        return {}
    from diffusers import UNet2DConditionModel

    from vlv.diffusion.unet import fixed_context
    from vlv.train.initialize import SD21_UNET

    sizes, tokens = (TOY_UNET, 5) if toy else (SD21_UNET, 77)
    torch.manual_seed(0)
    side = sizes["sample_size"]
    exact = UNet2DConditionModel(**sizes).eval().to(clock.device)
    latents = torch.randn(2 * batch, 4, side, side, device=clock.device)
    context = torch.randn(2 * batch, tokens, sizes["cross_attention_dim"], device=clock.device)
    rounded = UNet2DConditionModel(**sizes).eval().to(clock.device, dtype)
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())
    with FlopCounterMode(display=False) as counter:
        expected = exact(latents, 500, encoder_hidden_states=context).sample
    del exact
    latents, context = latents.to(dtype), context.to(dtype)
    step = torch.tensor(500, device=clock.device)

    def predict(model: Callable) -> torch.Tensor:
        return model(latents, step, encoder_hidden_states=context).sample

    with fixed_context(rounded, context):
        found = predict(rounded)
    result = {"name": "unet step", **judge(found, predict(rounded), expected)}
    if not result["correct"]:
        return result
    times = eager_and_compiled(clock, THEIRS, rounded, predict)
    with fixed_context(rounded, context):
        times |= eager_and_compiled(clock, OURS, rounded, predict)
    return summary(result, times, counter.get_total_flops() / limits["flops_per_s"] * 1e3, target=1.15)
