"""A stage-1 training step on a GPU against the published loop, in one call: correctness first, then images a second.

    python -m benchmarks.gpu.train                    # full size; writes benchmarks/gpu/train.json
    python -m benchmarks.gpu.train --budget 240 --micro-batch 32 64
    python -m benchmarks.gpu.train --dry-run          # toy sizes on a CPU: everything runs, no figure is shown

The published loop: float32, eager, Florence-2 and CLIP as transformers run them with eager attention, the UNet's
activations recomputed, AdamW. (Its data loading and DeepSpeed's communication are left out, in its favour.) Ours: the
trainer of `vlv.train.stage1 --preset paper-stage1` itself, on the same images. First the gradients of both are held
against float32: ours may be off by twice what plain PyTorch in bfloat16 is. Then, for each micro-batch: ours, the
published loop, ours with torch.compile. The file is written after each figure, and none is begun that would not end
within the budget. Exit code 1 where there is no GPU, where gradients are wrong, or where a target is missed. The rate
is what `vlv.train.stage1 --plan` counts the cost with.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vlv.common.command import command_line

OUT = Path("benchmarks/gpu/train.json")
SPEEDUP, MEMORY = 4.0, 0.6  # targets: of the published rate, and of its memory
TOY_UNET = {
    "block_out_channels": (32, 32), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 128,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1, "sample_size": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
TOY_VAE = {
    "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4, "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1,
}  # fmt: skip


class PublishedStage1(nn.Module):
    """The loss as the authors' VLV_stage1.py computes it, with transformers' modules and the weights of an encoder."""

    def __init__(self, encoder, t2i):
        super().__init__()
        from benchmarks.published_encoder import PublishedEncoder

        encoder.to_llm = nn.Identity()  # stage 1 ends at the context
        self.encoder = PublishedEncoder(encoder)
        encoder.to_llm = None
        self._theirs, self._preprocess = [t2i], encoder
        learning = [self.encoder.encoder, self.encoder.decoder, self.encoder.projection]
        for p in [self.encoder.queries, self.encoder.prompt, *(p for m in learning for p in m.parameters())]:
            p.requires_grad_(True)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        from kernels.upsample_normalize import upsample_normalize

        (t2i,), ours, pixels = self._theirs, self._preprocess, batch["pixels"]
        with torch.no_grad():
            with torch.autocast(pixels.device.type, enabled=False):
                posterior = t2i.vae.encode(pixels.float() / 127.5 - 1).latent_dist
            mean, std = posterior.mean, posterior.std
            latents = (mean + std * torch.randn_like(mean)) * t2i.vae.config.scaling_factor
            x = upsample_normalize(pixels, ours.resize, ours.mean, ours.std, torch.float32)
        return {"loss": t2i.noise_loss(latents, self.encoder(x.permute(0, 3, 1, 2)))}


def make(toy: bool, device: str):
    """A random encoder of stage 1 and a random text-to-image model: (encoder, t2i), float32."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from vlv.checkpoints import random_weights
    from vlv.diffusion.t2i import T2I
    from vlv.model.config import PRESETS
    from vlv.train.initialize import SD21_UNET, SD21_VAE

    torch.manual_seed(0)
    encoder = random_weights.encoder(replace(PRESETS["tiny" if toy else "qwen2.5-3b"], llm_width=0)).to(device)
    with torch.device(device):
        vae = AutoencoderKL.from_config(TOY_VAE if toy else SD21_VAE)
        unet = UNet2DConditionModel.from_config(TOY_UNET if toy else SD21_UNET)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    t2i = T2I(vae, unet, None, None, scheduler).eval().requires_grad_(False)
    t2i.unet.enable_gradient_checkpointing()
    return encoder, t2i


def gradients(objective: nn.Module, shared: list[Tensor], batch: dict, bf16: bool) -> Tensor:
    """The gradients that a pass leaves in weights that both objectives hold, as one vector."""
    objective.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with torch.autocast(batch["pixels"].device.type, torch.bfloat16, enabled=bf16):
        loss = objective(batch)["loss"]
    loss.backward()
    found = torch.cat([p.grad.float().flatten() for p in shared])
    objective.zero_grad(set_to_none=True)
    return found


def check(toy: bool, device: str, batch: dict) -> dict:
    """Our gradients in bfloat16, and plain PyTorch's, against float32, on weights that both hold."""
    from benchmarks.gpu.kernel_measure import judge
    from vlv.train import initialize
    from vlv.train.config import TrainConfig
    from vlv.train.objectives import Stage1

    encoder, t2i = make(toy, device)
    initialize.unfreeze_stage1(encoder, TrainConfig())
    published, ours = PublishedStage1(encoder, t2i), Stage1(encoder, t2i)
    bottleneck = encoder.bottleneck
    shared = [bottleneck.queries, bottleneck.prompt, *bottleneck.projection.parameters()]
    exact = gradients(published, shared, batch, bf16=False)
    plain = gradients(published, shared, batch, bf16=True)
    return judge(gradients(ours, shared, batch, bf16=True), plain, exact)


def rate(step: Callable[[], object], images: int, device: str, repeats: int) -> tuple[float, float]:
    """Images a second (the median step), and the peak of GPU memory in GiB."""
    cuda = device == "cuda"
    for _ in range(3 if cuda else 1):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return images / sorted(times)[len(times) // 2], peak


def published_rate(toy: bool, device: str, batch: dict, repeats: int) -> tuple[float, float]:
    encoder, t2i = make(toy, device)
    objective = PublishedStage1(encoder, t2i).train()
    learning = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-5, betas=(0.9, 0.99), weight_decay=0.01)

    def step() -> None:
        objective(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, len(batch["pixels"]), device, repeats)


def our_rate(toy: bool, device: str, batch: dict, repeats: int, compile: bool) -> tuple[float, float]:
    from vlv.train import initialize
    from vlv.train.config import TrainConfig
    from vlv.train.objectives import Stage1
    from vlv.train.parallel import World
    from vlv.train.trainer import Trainer

    images = len(batch["pixels"])
    config = TrainConfig(batch=images, micro_batch=images, compile=compile, spike=0)
    encoder, t2i = make(toy, device)
    initialize.unfreeze_stage1(encoder, config)
    t2i.unet.bfloat16().to(memory_format=torch.channels_last)
    if compile:
        t2i.unet.compile()

    def feed() -> Iterator[dict]:
        while True:
            yield {**batch, "position": 0, "replaced": [False] * images}

    with tempfile.TemporaryDirectory() as folder, World.start(device) as world:
        trainer, endless = Trainer("bench", Path(folder), config, Stage1(encoder, t2i), world), feed()
        return rate(lambda: trainer.train_step(endless), images, device, repeats)


def best(runs: list[dict], loop: str, micro_batch: int) -> dict | None:
    """Return the fastest measured run of a loop at a micro-batch."""
    found = [r for r in runs if r["loop"] == loop and r["micro_batch"] == micro_batch and "images_per_second" in r]
    return max(found, key=lambda r: r["images_per_second"], default=None)


def compare(report: dict) -> None:
    """Set the report's `published`, `ours`, `speedup` and `memory` from its runs: at the micro-batch of most gain."""
    runs = report["runs"]
    pairs = [(best(runs, "published", m), best(runs, "ours", m)) for m in {r["micro_batch"] for r in runs}]
    pairs = [(a, b) for a, b in pairs if a and b]
    if pairs:
        published, ours = max(pairs, key=lambda pair: pair[1]["images_per_second"] / pair[0]["images_per_second"])
        report |= {"published": published, "ours": ours}
        report["speedup"] = ours["images_per_second"] / published["images_per_second"]
        report["memory"] = ours["peak_gib"] / published["peak_gib"] if published["peak_gib"] else 0.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU; no figures")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="time for everything (600)")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[32, 64], help="images a step (32 64)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (10)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of ours (off, then on)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures ({OUT})")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device here; --dry-run checks this script on a CPU", file=sys.stderr)
        return 1
    from benchmarks import machine

    began = time.monotonic()
    toy, device = args.dry_run, "cpu" if args.dry_run else "cuda"
    micro_batches, repeats = ([2], 1) if toy else (args.micro_batch, args.repeats)
    side = 64 if toy else 384
    torch.manual_seed(2)
    pixels = torch.randint(256, (max(micro_batches), 3, side, side), dtype=torch.uint8, device=device)
    report: dict = {
        "command": command_line("benchmarks.gpu.train"), "machine": machine.describe(),
        "device": "dry run" if toy else torch.cuda.get_device_name(),
        "gradients": check(toy, device, {"pixels": pixels[:2]}),
        "targets": {"speedup": SPEEDUP, "memory": MEMORY}, "runs": [], "left_out": [],
    }  # fmt: skip

    def write() -> None:
        if not toy or args.out != OUT:
            args.out.write_text(json.dumps(report, indent=1) + "\n")

    found = report["gradients"]
    errors = f"gradients off by {found['rms']:.1e} (plain bfloat16: {found['rms_of_plain']:.1e})"
    write()
    if not found["correct"]:
        print(f"WRONG: {errors}; nothing is timed")
        return 1
    compiled = [False] if toy else [False, True] if args.compile is None else [args.compile]
    longest = 0.0
    for images in micro_batches:
        batch = {"pixels": pixels[:images]}
        loops = [("ours", compiled[0]), ("published", False), *(("ours", c) for c in compiled[1:])]
        for loop, compile in loops:
            run = {"loop": loop, "micro_batch": images, "compile": compile}
            start = time.monotonic()
            if start - began + 1.2 * longest > args.budget:
                report["left_out"].append(run)
                write()
                continue
            gc.collect()
            if not toy:
                torch.cuda.empty_cache()
            try:
                if loop == "ours":
                    speed, memory = our_rate(toy, device, batch, repeats, compile)
                else:
                    speed, memory = published_rate(toy, device, batch, repeats)
                run |= {"images_per_second": speed, "peak_gib": memory}
            except torch.OutOfMemoryError:
                run |= {"error": "out of memory"}
            run["seconds"] = round(time.monotonic() - start, 1)
            longest = max(longest, run["seconds"])
            report["runs"].append(run)
            compare(report)
            write()
            if not toy:
                print(json.dumps(run), flush=True)
    if toy:
        print(f"runs; {errors}")
        return 0
    if "speedup" not in report:
        print(f"no pair of figures within {args.budget:g} s; {errors}")
        return 1
    ours, theirs = report["ours"], report["published"]
    print(
        f"{ours['images_per_second']:.1f} images/s against {theirs['images_per_second']:.1f}: "
        f"{report['speedup']:.2f}x, target {SPEEDUP}x; {ours['peak_gib']:.1f} GiB against {theirs['peak_gib']:.1f}: "
        f"{report['memory']:.0%}, target {MEMORY:.0%}; {errors}"
    )
    return 0 if report["speedup"] >= SPEEDUP and report["memory"] <= MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
