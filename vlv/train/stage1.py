"""Stage 1: the encoder learns, from images alone, embeddings that a frozen text-to-image model can draw from.

Paper section 3.2: VAE, UNet and CLIP text layers stay frozen; the vision encoder, its language model,
the queries and the projection learn from the error of the predicted noise.

The paper starts from Florence-2's pretrained weights; there is no such model of the synthetic world. In
its place a linear layer, dropped afterwards, reads the frozen autoencoder's latents from the image
features, so that the tower sees from the first steps on. This too needs images only.

    python -m vlv.train.stage1 --preset tiny
    torchrun --nproc-per-node 8 -m vlv.train.stage1 --preset paper-stage1 --data SHARDS --ckpt START --t2i SD_DIR

With the paper's preset it trains on your images (vlv.train.pretrain), without that linear layer.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vlv.model.config import PRESETS
from vlv.train import cli
from vlv.train import config as paper
from vlv.train import pretrain as scale
from vlv.train.presets import STAGE1, Stage1Config


def train(settings: Stage1Config, t2i_folder: Path, run: Path, out: Path, device: str) -> None:
    """Train, resuming what `run` holds, and write the checkpoint folder `out`: encoder and t2i/, no llm/."""
    import torch
    from torch.nn.functional import mse_loss, pixel_unshuffle

    from vlv.checkpoints import folder as checkpoint
    from vlv.data import scene_batches as data
    from vlv.diffusion.t2i import T2I
    from vlv.model.encoder import VLVEncoder
    from vlv.train.loop import Loop
    from vlv.train.t2i import latents

    torch.manual_seed(0)
    t2i = T2I.load(t2i_folder).to(device)
    t2i.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    encoder = VLVEncoder(PRESETS[settings.model]).to(device)
    encoder.bottleneck.text.copy_from(t2i.text_encoder)
    encoder.bottleneck.text.requires_grad_(False)
    encoder.to_llm.requires_grad_(False)  # belongs to stage 2
    bottleneck, last = encoder.bottleneck, encoder.bottleneck.projection[2]
    with torch.no_grad():
        # the text layers expect token embeddings: start at their scale, or their attention hardly counts
        words = t2i.text_encoder.get_input_embeddings().weight.std()
        features = encoder.features(data.images(range(8)).to(device))
        scale = (words / bottleneck.projection(bottleneck.decode(features)).std()).item()
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    cache = latents(t2i, settings.pool, run)
    side = round((features.shape[1] - 1) ** 0.5)  # the features' map; the mean token comes first
    cells = cache.shape[-1] // side
    readout = torch.nn.Linear(features.shape[2], cache.shape[1] * cells**2).to(device)
    # Adam's steps do not shrink with the weights: at the full rate the last layer leaves that scale within a few
    # steps, the text layers lose sight of their positions, and all queries become one
    slow, rate = list(last.parameters()), settings.loop.lr
    held = {id(p) for p in (*slow, *encoder.to_llm.parameters(), *bottleneck.text.parameters())}
    others = [*(p for p in encoder.parameters() if id(p) not in held), *readout.parameters()]
    groups = [{"params": others, "lr": rate}, {"params": slow, "lr": rate * scale}]
    loop = Loop("stage1", run, settings.loop, {"encoder": encoder, "readout": readout}, groups)

    def loss(step: int) -> dict[str, torch.Tensor]:
        chosen = data.seeds(step, settings.loop.batch, settings.pool)
        target = cache[chosen].float().to(device)
        features = encoder.features(data.images(chosen).to(device))
        noise = t2i.noise_loss(target, bottleneck(features), settings.noise_draws)
        seen = mse_loss(readout(features[:, 1:]), pixel_unshuffle(target, cells).flatten(2).transpose(1, 2))
        return {"loss": noise + settings.readout * seen, "noise": noise, "readout": seen}

    loop.run(loss)
    checkpoint.save(out, encoder, torch.float16)
    shutil.copytree(t2i_folder, out / "t2i", dirs_exist_ok=True)


def main() -> None:
    parser = cli.parser("stage1", [*STAGE1, "paper-stage1"], __doc__)
    parser.add_argument("--t2i", type=Path, help="diffusers folder to draw through (RUN/t2i; at scale: CKPT/t2i)")
    paper.add_flags(parser, "paper-stage1")
    args = parser.parse_args()
    run, out = cli.folders(args, "stage1")
    if args.preset in paper.PRESETS:
        scale.run("stage1", args, run, out)
    else:
        scale.refuse_flags(parser, args)
        train(STAGE1[args.preset], args.t2i or run / "t2i", run, out, args.device or "cpu")


if __name__ == "__main__":
    cli.run(main)
