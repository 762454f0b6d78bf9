"""The memory of a training step at full size, on any machine: every tensor is a description without data.

The real objective's forward and backward pass run under torch's FakeTensorMode, while the bytes of all tensors alive
are added up. FSDP2 is counted from that: weights, gradients and optimiser divide among the GPUs, and one block at a
time is gathered whole. Not counted: the allocator's fragments, the context of CUDA and the buffers of NCCL (1-2 GB).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vlv.train.config import TrainConfig
from vlv.train.initialize import Stage
from vlv.train.parallel import blocks

Builder = Callable[[TrainConfig], Stage]  # builds the stage without weights


def plan(build: Builder, config: TrainConfig, gpus: int) -> str:
    """Return a table of each GPU's memory in a step on `gpus` of them."""
    passes = config.accumulation(gpus)
    parts = measure(build, config)
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


def measure(build: Builder, config: TrainConfig) -> dict[str, int]:
    """Return the bytes by kind of a step on one GPU that holds everything."""
    with FakeTensorMode():
        stage = build(replace(config, compile=False))
        objective = stage.objective
        objective.train()
        for block in blocks(objective) if config.checkpoint_activations else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        size = stage.model.image_size
        batch = {"pixels": torch.zeros(config.micro_batch, 3, size, size, dtype=torch.uint8)}
        batch["caption"] = [""] * config.micro_batch
        learning = [p for p in objective.parameters() if p.requires_grad]
        for p in learning:  # as in all but the first pass of a step: counted by itself, and added to in place
            p.grad = torch.zeros_like(p)
        with Peak() as peak:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                losses = objective(batch)
            losses["loss"].backward()
    still = [p for p in objective.parameters() if not p.requires_grad]
    t2i = list(stage.t2i.parameters()) if stage.t2i else []  # every GPU has it whole
    weights = _bytes(learning)
    units = sorted((_bytes(b.parameters()) for b in blocks(objective)), reverse=True)[:2]
    return {
        "weights": weights, "still": _bytes(still), "t2i": _bytes(t2i), "gradients": weights, "moments": 2 * weights,
        "gathered": sum(units) // (2 if config.bf16 else 1), "activations": peak.bytes,
        "learning": sum(p.numel() for p in learning), "frozen": sum(p.numel() for p in (*still, *t2i)),
    }  # fmt: skip


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made within, and their largest sum at one time."""

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
