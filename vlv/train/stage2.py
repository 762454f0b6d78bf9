"""Stage 2: a language model learns to write the caption that the embeddings hold.

Paper section 3.3: the LLM, the projection to its width and the encoder learn from the captions'
cross-entropy; the queries, the projection after them and the CLIP layers stay as stage 1 left them.
The paper's language model comes pretrained. Ours starts from nothing, and what it would teach the
encoder meanwhile is noise that wipes out what stage 1 has learned: so the encoder joins late (the
paper's progressive unfreezing: MLP and language model first, then the encoder).

    python -m vlv.train.stage2 --preset tiny
    torchrun --nproc-per-node 8 -m vlv.train.stage2 --preset paper-stage2 --data CAPTIONS.jsonl --ckpt STAGE1 --llm QWEN
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vlv.train import cli
from vlv.train import config as paper
from vlv.train import pretrain as scale
from vlv.train.presets import STAGE2, Stage2Config


def build_llm(settings: Stage2Config):
    """A small untrained Qwen2 and a tokenizer for the scenes' captions: (model, tokenizer)."""
    import numpy as np
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vlv.data import scenes
    from vlv.data.tokenizers import qwen_tokenizer

    rng = np.random.default_rng(0)
    tokenizer = qwen_tokenizer(scenes.caption(scenes.sample(s), rng) for s in range(4000))
    width = 64 * settings.llm_heads
    end = tokenizer.eos_token_id
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=settings.llm_layers,
            num_attention_heads=settings.llm_heads,
            num_key_value_heads=settings.llm_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    return llm, tokenizer


def train(settings: Stage2Config, stage1: Path, run: Path, out: Path, device: str) -> None:
    """Train from the stage-1 folder, resuming what `run` holds, and write the whole checkpoint folder `out`."""
    import numpy as np
    import torch

    from vlv.checkpoints import folder as checkpoint
    from vlv.data import scene_batches as data
    from vlv.data import scenes
    from vlv.model.captioner import Captioner
    from vlv.train.loop import Loop

    torch.manual_seed(0)
    start = checkpoint.Checkpoint.open(stage1)
    encoder = start.load_encoder().requires_grad_(True)
    bottleneck = encoder.bottleneck
    for frozen in (bottleneck.queries, *bottleneck.projection.parameters(), *bottleneck.text.parameters()):
        frozen.requires_grad_(False)
    captioner = Captioner(encoder, *build_llm(settings)).to(device).train()
    new = [*captioner.llm.parameters(), *encoder.to_llm.parameters()]
    held = {id(p) for p in new}
    old = [p for p in encoder.parameters() if p.requires_grad and id(p) not in held]
    groups = [{"params": new, "lr": settings.loop.lr}, {"params": old, "lr": settings.encoder_lr}]
    loop = Loop("stage2", run, settings.loop, {"encoder": encoder, "llm": captioner.llm}, groups)

    def loss(step: int) -> dict[str, torch.Tensor]:
        for p in old:
            p.requires_grad_(step >= settings.encoder_from)
        chosen = data.seeds(step, settings.loop.batch, settings.pool)
        rng = np.random.default_rng([2, step])
        captions = [scenes.caption(scenes.sample(s), rng) for s in chosen]
        return {"loss": captioner.loss(data.images(chosen).to(device), captions)}

    loop.run(loss)
    checkpoint.save(out, encoder, torch.float16)
    captioner.llm.half().save_pretrained(out / "llm")
    captioner.tokenizer.save_pretrained(out / "llm")
    if (t2i := start.folder / "t2i").is_dir() and out != start.folder:
        shutil.copytree(t2i, out / "t2i", dirs_exist_ok=True)


def main() -> None:
    parser = cli.parser("stage2", [*STAGE2, "paper-stage2"], __doc__)
    parser.add_argument("--stage1", type=Path, help="stage-1 folder (RUN/stage1); at scale it is --ckpt")
    parser.add_argument("--llm", metavar="DIR", help="at scale: language model to start from (CKPT's)")
    paper.add_flags(parser, "paper-stage2")
    args = parser.parse_args()
    run, out = cli.folders(args, "stage2")
    if args.preset in paper.PRESETS:
        if args.stage1:
            parser.error(f"--stage1 belongs to the toy presets: with --preset {args.preset} give the folder as --ckpt")
        scale.run("stage2", args, run, out)
    else:
        scale.refuse_flags(parser, args)
        train(STAGE2[args.preset], args.stage1 or run / "stage1", run, out, args.device or "cpu")


if __name__ == "__main__":
    cli.run(main)
