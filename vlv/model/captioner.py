"""Join encoder and language model: the training loss of stage 2 and the reference generation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlv.checkpoints.folder import Checkpoint
from vlv.checkpoints.llm_folder import check_llm_folder
from vlv.model.clean_up import clean_caption
from vlv.model.encoder import VLVEncoder
from vlv.model.generation import cut_at_end, end_tokens, greedy_generation_config


class Captioner(nn.Module):
    """Caption images: encoder -> prompt embeddings -> text, with a transformers causal language model."""

    def __init__(self, encoder: VLVEncoder, llm, tokenizer):
        super().__init__()
        self.encoder = encoder
        self.llm = llm
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Captioner:
        """Load a checkpoint's encoder and LLM in eval mode. Raises CheckpointError."""
        check_llm_folder(checkpoint.llm)
        llm = AutoModelForCausalLM.from_pretrained(checkpoint.llm, dtype=dtype)
        return cls(checkpoint.load_encoder(dtype), llm, AutoTokenizer.from_pretrained(checkpoint.llm)).eval()

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Return the token ids that end a caption; training teaches the first."""
        return end_tokens(self.llm, self.tokenizer)

    def loss(self, pixels: Tensor, captions: list[str], max_length: int = 300, end: bool = True) -> Tensor:
        """Return the mean cross-entropy of the captions' tokens (paper section 3.3).

        pixels: uint8 [B, 3, S, S]. The embeddings come first, then each caption, cut to `max_length`
        tokens; padding is ignored. With `end` the end token is a target too; without it, the loss is the
        published one (whose padding token is its end token, so that it is ignored).
        """
        ids, mask = self._targets(captions, max_length, end, pixels.device)
        prompt = self.encoder(pixels)
        inputs = torch.cat([prompt, self.llm.get_input_embeddings()(ids).to(prompt.dtype)], dim=1)
        ones = mask.new_ones(prompt.shape[:2])
        logits = self.llm(inputs_embeds=inputs, attention_mask=torch.cat([ones, mask], dim=1)).logits
        # the last embedding predicts the first token: the logits from there on, less the last one
        logits = logits[:, prompt.shape[1] - 1 : -1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.masked_fill(mask == 0, -100).flatten())

    def _targets(self, captions: list[str], max_length: int, end: bool, device) -> tuple[Tensor, Tensor]:
        """Return token ids [B, T], padded to the longest, and the mask of the tokens that count."""
        stop = self.end_tokens[0]
        rows = [
            self.tokenizer(c, add_special_tokens=False).input_ids[: max_length - end] + [stop] * end for c in captions
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [stop] * (longest - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        return ids, mask

    @torch.inference_mode()
    def generate(self, pixels: Tensor, max_new_tokens: int = 300, num_beams: int = 1, **options) -> list[list[int]]:
        """Generate token ids for each image, without end and padding tokens; greedy by default.

        The published decoding is `num_beams=4` with early stopping.
        """
        prompt = self.encoder(pixels)
        config = greedy_generation_config(self.llm, max_new_tokens, self.end_tokens, num_beams=num_beams, **options)
        mask = prompt.new_ones(prompt.shape[:2], dtype=torch.long)
        ids = self.llm.generate(inputs_embeds=prompt, attention_mask=mask, generation_config=config)
        return [cut_at_end(row, self.end_tokens) for row in ids.tolist()]

    def captions(self, pixels: Tensor, **options) -> list[str]:
        """Return cleaned captions of images uint8 [B, 3, S, S]; `options` as for `generate`."""
        return [clean_caption(self.tokenizer.decode(row)) for row in self.generate(pixels, **options)]
