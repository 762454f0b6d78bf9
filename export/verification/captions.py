"""Compare the greedy captions that a language model writes from two sets of prompt embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlv.checkpoints.folder import Checkpoint
from vlv.model.captioner import Captioner


@dataclass(frozen=True)
class Captions:
    """Greedy captions of the reference's embeddings, and how many of their tokens other embeddings keep."""

    llm: torch.nn.Module
    end: int
    expected: list[list[int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, prompts: Tensor) -> Captions:
        """Caption the reference's embeddings, float32 [B, N, H]."""
        captioner = Captioner.load(checkpoint)
        captions = cls(captioner.llm, captioner.tokenizer.eos_token_id, [])
        captions.expected.extend(captions.generate(prompts))
        return captions

    @torch.inference_mode()
    def generate(self, prompts: Tensor, tokens: int = 96) -> list[list[int]]:
        """Return token ids, padded with end tokens to the longest caption."""
        config = GenerationConfig(max_new_tokens=tokens, eos_token_id=self.end, pad_token_id=self.end)
        mask = torch.ones(prompts.shape[:2], dtype=torch.long)
        return self.llm.generate(inputs_embeds=prompts, attention_mask=mask, generation_config=config).tolist()

    def agreement(self, prompts: Tensor) -> dict:
        """Return the share of equal tokens, position by position, up to the end of the longer caption."""
        same = total = 0
        for found, expected in zip(self.generate(prompts), self.expected, strict=True):
            found, expected = (row[: row.index(self.end) + 1] if self.end in row else row for row in (found, expected))
            total += max(len(found), len(expected))
            same += sum(a == b for a, b in zip(found, expected, strict=False))
        return {"images": len(self.expected), "tokens": total, "agreement": same / total}
