"""A stage-1 training step on a GPU against the published loop, in one call: correctness first, then images a second.

    python -m benchmarks.gpu.train                    # full size; writes benchmarks/gpu/train.json
    python -m benchmarks.gpu.train --micro-batch 64 --no-compile
    python -m benchmarks.gpu.train --dry-run          # toy sizes on a CPU: everything runs, no figure is shown

The published loop: float32, eager, Florence-2 and CLIP as transformers run them with eager attention, the UNet's
activations recomputed, AdamW. (Its data loading and DeepSpeed's communication are left out, in its favour.) Ours: the
trainer of `vlv.train.stage1 --preset paper-stage1` itself, on the same pictures. First the gradients of both are held
against float32: ours may be off by twice what plain PyTorch in bfloat16 is. Exit code 1 where there is no GPU, where
gradients are wrong, or where the target is missed.
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

OUT, TARGET = Path("benchmarks/gpu/train.json"), 4.0
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
    from benchmarks.gpu.kernels import judge
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU; no figures")
    parser.add_argument("--micro-batch", type=int, default=32, help="images a step (32; the authors' 64 need 80 GB)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (10)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile (on)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures ({OUT})")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device here; --dry-run checks this script on a CPU", file=sys.stderr)
        return 1
    from benchmarks import machine

    toy, device = args.dry_run, "cpu" if args.dry_run else "cuda"
    images, repeats = (2, 1) if toy else (args.micro_batch, args.repeats)
    side = 64 if toy else 384
    torch.manual_seed(2)
    batch = {"pixels": torch.randint(256, (images, 3, side, side), dtype=torch.uint8, device=device)}
    few = {"pixels": batch["pixels"][:2]}
    report: dict = {
        "machine": machine.describe(), "device": "dry run" if toy else torch.cuda.get_device_name(),
        "micro_batch": images, "gradients": check(toy, device, few),
    }  # fmt: skip
    found = report["gradients"]
    errors = f"gradients off by {found['rms']:.1e} (plain bfloat16: {found['rms_of_plain']:.1e})"
    if not found["correct"]:
        print(f"WRONG: {errors}; nothing is timed")
        return 1
    for name, measure in {
        "published": lambda: published_rate(toy, device, batch, repeats),
        "ours": lambda: our_rate(toy, device, batch, repeats, args.compile and not toy),
    }.items():
        gc.collect()
        if not toy:
            torch.cuda.empty_cache()
        speed, memory = measure()
        report[name] = {"images_per_second": speed, "peak_gib": memory}
    if toy:
        print(f"runs; {errors}")
    else:
        ours, theirs = report["ours"], report["published"]
        ratio = ours["images_per_second"] / theirs["images_per_second"]
        report |= {"speedup": ratio, "target": TARGET}
        print(
            f"{ours['images_per_second']:.1f} images/s against {theirs['images_per_second']:.1f}: {ratio:.2f}x, "
            f"target {TARGET}x; {ours['peak_gib']:.1f} GiB against {theirs['peak_gib']:.1f}; {errors}"
        )
    if not toy or args.out != OUT:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if toy or report["speedup"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
