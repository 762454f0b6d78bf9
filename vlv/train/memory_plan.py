"""The memory of a training step at full size, on any machine: every tensor is a description without data.

The real objective's forward and backward pass run under torch's FakeTensorMode, while the bytes of all tensors alive
are added up. FSDP2 is counted from that: weights, gradients and optimiser divide among the GPUs, and one block at a
time is gathered whole. Not counted: the allocator's fragments, the context of CUDA and the buffers of NCCL (1-2 GB).
"""

from __future__ import annotations

import argparse
import weakref
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vlv.checkpoints.folder import Checkpoint
from vlv.checkpoints.published import resolve
from vlv.model.config import PRESETS, VLVConfig
from vlv.train import initialize as start
from vlv.train.config import TrainConfig
from vlv.train.objectives import Stage1, Stage2
from vlv.train.parallel import blocks

SD21_UNET = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
SD21_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": 768,
}  # fmt: skip


def plan(stage: str, config: TrainConfig, args: argparse.Namespace) -> str:
    """A table of one GPU's memory in a step, for `args.plan` GPUs."""
    gpus = args.plan
    passes = config.accumulation(gpus)
    parts = measure(stage, config, args)
    shards = gpus if config.parallel == "fsdp" else 1
    rows = [
        ("weights that learn, float32", parts["weights"] / shards),
        ("weights that are frozen", parts["still"] / shards + parts["t2i"]),
        ("gradients, float32", parts["gradients"] / shards),
        ("AdamW's two moments, float32", parts["moments"] / shards),
        ("average of the weights, float32", parts["weights"] / shards if config.ema else 0),
        ("one block, gathered in bfloat16, and the next" if config.bf16 else "gathered blocks", parts["gathered"]),
        (f"activations of {config.micro_batch} images, at their peak", parts["activations"]),
    ]
    if shards == 1:
        rows = [r for r in rows if not r[0].startswith(("one block", "gathered"))]
    total = sum(size for _, size in rows)
    lines = [f"{name:<48}{size / 2**30:8.2f} GiB" for name, size in rows if size]
    lines += [f"{'in all, for each of ' + str(gpus) + ' GPUs, by ' + config.parallel:<48}{total / 2**30:8.2f} GiB"]
    lines += [f"{config.batch} images a step: {gpus} GPUs x {passes} passes x {config.micro_batch}"]
    lines += [f"{parts['learning']:,} parameters learn, {parts['frozen']:,} are frozen"]
    return "\n".join(lines)


def measure(stage: str, config: TrainConfig, args: argparse.Namespace) -> dict[str, int]:
    """Bytes by kind of a step on one GPU that holds everything."""
    begin = resolve(args.ckpt) if args.ckpt else None  # outside: what is published is converted with its data
    with FakeTensorMode():
        objective, frozen, model = {"stage1": _stage1, "stage2": _stage2}[stage](config, args, begin)
        objective.train()
        for block in blocks(objective) if config.checkpoint_activations else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        size = model.image_size
        batch = {"pixels": torch.zeros(config.micro_batch, 3, size, size, dtype=torch.uint8)}
        batch["caption"] = [""] * config.micro_batch
        learning = [p for p in objective.parameters() if p.requires_grad]
        for p in learning:  # as in all but the first pass of a step: counted by itself, and added to in place
            p.grad = torch.zeros_like(p)
        with Peak() as peak:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                loss = objective(batch)
            loss.backward()
    still = [p for p in objective.parameters() if not p.requires_grad]
    t2i = [p for module in frozen for p in module.parameters()]  # every GPU has it whole
    weights = _bytes(learning)
    units = sorted((_bytes(b.parameters()) for b in blocks(objective)), reverse=True)[:2]
    return {
        "weights": weights, "still": _bytes(still), "t2i": _bytes(t2i), "gradients": weights, "moments": 2 * weights,
        "gathered": sum(units) // (2 if config.bf16 else 1), "activations": peak.bytes,
        "learning": sum(p.numel() for p in learning), "frozen": sum(p.numel() for p in (*still, *t2i)),
    }  # fmt: skip


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what is made within."""

    def __init__(self):
        super().__init__()
        self.bytes, self._alive, self._seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage())
        self.bytes = max(self.bytes, self._alive)
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self._alive -= size


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


Parts = tuple[nn.Module, list[nn.Module], VLVConfig]  # the objective, what is frozen beside it, the model's sizes


def _model(config: TrainConfig, begin: Checkpoint | None, llm_width: int) -> VLVConfig:
    return start.model_config(begin.config if begin else PRESETS["qwen2.5-3b"], config, llm_width)


def _stage1(config: TrainConfig, args: argparse.Namespace, begin: Checkpoint | None) -> Parts:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from vlv.diffusion.t2i import T2I
    from vlv.model.encoder import VLVEncoder

    model = _model(config, begin, 0)
    folder = args.t2i or (begin.t2i if begin else None)
    unet = UNet2DConditionModel.load_config(folder / "unet") if folder else SD21_UNET
    vae = AutoencoderKL.load_config(folder / "vae") if folder else SD21_VAE
    t2i = T2I(AutoencoderKL.from_config(vae), UNet2DConditionModel.from_config(unet), None, None, DDPMScheduler())
    t2i.eval().requires_grad_(False)
    if config.bf16:
        for p in t2i.unet.parameters():  # tensors without data cannot be cast in place
            p.data = p.data.bfloat16()
    if config.checkpoint_activations:
        t2i.unet.enable_gradient_checkpointing()
    encoder = VLVEncoder(model)
    start.unfreeze_stage1(encoder, config)
    return Stage1(encoder, t2i), [t2i.vae, t2i.unet], model


def _stage2(config: TrainConfig, args: argparse.Namespace, begin: Checkpoint | None) -> Parts:
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlv.checkpoints.random_weights import llm_plan
    from vlv.model.captioner import Captioner
    from vlv.model.encoder import VLVEncoder

    folder = args.llm or (begin.llm if begin else None)
    about = AutoConfig.from_pretrained(folder) if folder else llm_plan("qwen2.5-3b", torch.float32)[0]
    about.use_cache = False
    llm = AutoModelForCausalLM.from_config(about)
    model = _model(config, begin, llm.config.hidden_size)
    captioner = Captioner(VLVEncoder(model), llm, _Longest(config.max_tokens))
    start.unfreeze_stage2(captioner, config)
    return Stage2(captioner, config.max_tokens, config.end_token), [], model


class _Longest:
    """In a tokenizer's place: every caption has as many tokens as a caption may have."""

    eos_token_id = 0

    def __init__(self, length: int):
        self.input_ids = [0] * length

    def __call__(self, text: str, add_special_tokens: bool = False) -> _Longest:
        return self
