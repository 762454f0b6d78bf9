"""Make the requests that vLLM's processor would make of an image, from what is already a crop or embeddings."""

from __future__ import annotations

from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

from serve.vllm_model.config import PLACEHOLDER

MODALITY = "image"
FIELDS = {name: MultiModalFieldConfig.batched(MODALITY) for name in ("crops", "embeds")}  # one for each image


def image_input(field: str, values: Tensor, queries: int, name: str) -> dict:
    """Return the input of one request. `field`: of FIELDS; `name`: of this image alone, or vLLM takes another's output.

    values: uint8 [3, S, S] for crops, float [queries, llm_width] for embeds.
    """
    items = MultiModalKwargsItems.from_hf_inputs({field: values[None]}, FIELDS)
    return {
        "type": "multimodal",
        "prompt_token_ids": [PLACEHOLDER] * queries,
        "mm_kwargs": items,
        "mm_hashes": {MODALITY: [name]},
        "mm_placeholders": {MODALITY: [PlaceholderRange(offset=0, length=queries)]},
    }
