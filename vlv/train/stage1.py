"""Stage 1: the encoder learns, from images alone, embeddings that a frozen text-to-image model can draw from.

Paper section 3.1: VAE, UNet and CLIP text layers stay frozen; the vision encoder, its language model,
the queries and the projection learn from the error of the predicted noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vlv.config import PRESETS
from vlv.train import cli
from vlv.train.presets import STAGE1, Stage1Config


def train(settings: Stage1Config, t2i_folder: Path, run: Path, out: Path, device: str) -> None:
    """Train, resuming what `run` holds, and write the checkpoint folder `out`: encoder and t2i/, no llm/."""
    import torch

    from vlv import checkpoint
    from vlv.diffusion import T2I
    from vlv.encoder import VLVEncoder
    from vlv.train import data
    from vlv.train.loop import Loop
    from vlv.train.t2i import latents

    torch.manual_seed(0)
    t2i = T2I.load(t2i_folder).to(device)
    t2i.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    encoder = VLVEncoder(PRESETS[settings.model]).to(device)
    encoder.bottleneck.text.copy_from(t2i.text_encoder)
    encoder.bottleneck.text.requires_grad_(False)
    encoder.to_llm.requires_grad_(False)  # belongs to stage 2
    with torch.no_grad():
        # the text layers expect token embeddings: start at their scale, or their attention hardly counts
        words = t2i.text_encoder.get_input_embeddings().weight.std()
        bottleneck = encoder.bottleneck
        start = bottleneck.projection(bottleneck.decode(encoder.features(data.images(range(8)).to(device)))).std()
        bottleneck.projection[2].weight.mul_(words / start)
    cache = latents(t2i, settings.pool, run)
    loop = Loop("stage1", run, settings.loop, {"encoder": encoder})

    def loss(step: int) -> dict[str, torch.Tensor]:
        chosen = data.seeds(step, settings.loop.batch, settings.pool)
        context = encoder.context(data.images(chosen).to(device))
        return {"loss": t2i.noise_loss(cache[chosen].float().to(device), context, settings.noise_draws)}

    loop.run(loss)
    checkpoint.save(out, encoder, torch.float16)
    shutil.copytree(t2i_folder, out / "t2i", dirs_exist_ok=True)


def main() -> None:
    parser = cli.parser("stage1", STAGE1, __doc__)
    parser.add_argument("--t2i", type=Path, help="diffusers folder to reconstruct through (default: RUN/t2i)")
    args = parser.parse_args()
    run, out = cli.folders(args, "stage1")
    train(STAGE1[args.preset], args.t2i or run / "t2i", run, out, args.device)


if __name__ == "__main__":
    cli.run(main)
