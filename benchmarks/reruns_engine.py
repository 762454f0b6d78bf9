"""Run the batch command with a hash of the pixels as caption: python -P benchmarks/reruns_engine.py PATHS... FLAGS

Listing, decoding, batches, records and files are those of `python -m serve.vllm_caption`; encoder and language model
are left out, so that 100,000 images take minutes. A caption tells which pixels it was made from, and comes after up to
20 ms, so that the order of the records is not that of the images; a batch of the encoder takes 10 ms. The engine stands
in for `--engine transformers`, and runs in the checkout that PYTHONPATH names, also in one from before the folders of
serve.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import random
import sys
import time

BATCH_SECONDS = 0.01


def replace_models() -> None:
    """Put the hash in the place of encoder and language model."""
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401 (the engine imports it in one build, later in another)

    def encode(*arguments):
        """Return the crops uint8 [B, 3, S, S], the last argument, as a tensor."""
        time.sleep(BATCH_SECONDS)
        return torch.from_numpy(arguments[-1])

    if importlib.util.find_spec("serve.engines"):
        from serve.core.batcher import PassCrops
        from serve.engines import transformers as module
        from serve.engines.base import Completion

        PassCrops.__call__ = encode
    else:  # the build before
        from serve.llm import Completion

        from serve import pipeline
        from serve import transformers_engine as module

        pipeline.open_encoder = lambda *_: encode

    class PixelHash(module.TransformersEngine):
        """Write the first digits of the SHA-256 of an image's pixels, uint8 [3, S, S]."""

        takes_crops = True
        alive = True

        async def start(self) -> None:
            """Load nothing."""

        async def generate(self, embeds: torch.Tensor, sampling) -> Completion:
            """Return the caption after a random time."""
            await asyncio.sleep(random.random() / 50)
            return Completion(f"Pixels {hashlib.sha256(embeds.numpy().tobytes()).hexdigest()[:16]}.", [1], "stop")

        async def close(self) -> None:
            """Free nothing."""

    module.TransformersEngine = PixelHash


if __name__ == "__main__":
    from serve.vllm_caption import main

    replace_models()
    sys.exit(main())
