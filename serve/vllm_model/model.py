"""Run VLV inside vLLM: the encoder and the language model as one of vLLM's multimodal models.

An image becomes `queries` prompt tokens, whose embeddings come from the encoder; the prompt holds nothing else, as in
training. vLLM imports this file for a folder of serve.vllm_plugin. The base classes are those of vLLM's own models; the
most similar one is vLLM's model_executor/models/blip2.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptIndexTargets,
    PromptInsertion,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from serve.vllm_model.config import PLACEHOLDER, CaptionerConfig
from serve.vllm_model.requests import FIELDS
from vlv.data.image import crop_image, load_crop
from vlv.model.config import VLVConfig
from vlv.model.encoder import VLVEncoder

LLM = "llm."  # prefix of the language model's tensors while they are loaded
BATCH = 32  # images that the encoder takes at once


class Parser(MultiModalDataParser):
    """Read images as every other command does: into crops, with ICC profiles, orientation and 16 bits applied."""

    def __init__(self, size: int):
        """`size`: pixels of a crop's side."""
        super().__init__()
        self._size = size

    def _parse_image_data(self, data) -> ImageProcessorItems | None:
        if data is None or self.is_embeddings(data):
            return super()._parse_image_data(data)
        is_array = isinstance(data, np.ndarray | Tensor)
        one = isinstance(data, Image.Image | MediaWithBytes) or (is_array and data.ndim < 4)
        return ImageProcessorItems([_crop(image, self._size) for image in ([data] if one else data)])


class Info(BaseProcessingInfo):
    """Tell vLLM what a prompt may hold: one image."""

    @property
    def encoder(self) -> VLVConfig:
        return VLVConfig.from_dict(self.ctx.get_hf_config(CaptionerConfig).encoder)

    def get_data_parser(self) -> MultiModalDataParser:
        return Parser(self.encoder.image_size)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.encoder.queries}


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """Make a request of the largest size, by which vLLM plans its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options) -> dict:
        size = self.info.encoder.image_size
        return {"image": self._get_dummy_images(width=size, height=size, num_images=mm_counts.get("image", 0))}


class Processor(BaseMultiModalProcessor[Info]):
    """Pass on the crop of an image, and turn the prompt into the placeholders of its embeddings."""

    def _call_hf_processor(self, hf_data: Mapping, hf_kwargs: Mapping) -> BatchFeature:
        return BatchFeature({"crops": torch.from_numpy(np.stack(hf_data["images"])).permute(0, 3, 1, 2)})

    if not hasattr(BaseMultiModalProcessor, "_postprocess_prompt"):  # vLLM 0.26 processes the prompt with the images

        def _apply_hf_processor_main(self, mm_items, **kwargs) -> tuple[list[int], BatchFeature, bool]:
            """Return the prompt without its text, the crops, and that no placeholders have been put in yet."""
            data, _ = self._get_hf_mm_data(mm_items)  # without images where vLLM has all of them in its cache
            return [], self._call_hf_processor(data, {}) if data.get("images") else BatchFeature(), False

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        return FIELDS

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """Drop the text: the language model has learned to continue embeddings alone."""
        return []

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptInsertion]:
        tokens = [PLACEHOLDER] * self.info.encoder.queries
        return [PromptInsertion("image", PromptIndexTargets.start(), tokens)]


def _crop(image: Image.Image | MediaWithBytes | np.ndarray | Tensor, size: int) -> np.ndarray:
    """Return the crop of vlv.data.image.load_crop, uint8 [size, size, 3]. Raises ImageError or ValueError.

    A crop stays as it is, since vLLM parses some images twice. vLLM has decoded a file that it has read, and keeps its
    content; it is decoded again where vLLM may have changed its mode, or has not applied its profile.
    """
    if isinstance(image, MediaWithBytes):
        # vLLM 0.26 does not say whether it has
        if getattr(image, "io_config", True) or image.media.info.get("icc_profile"):
            return load_crop(image.original_bytes, size).transpose(1, 2, 0)
        image = image.media
    if isinstance(image, Image.Image):
        return crop_image(image, size).transpose(1, 2, 0)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is a PIL image or uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    return crop_image(Image.fromarray(image), size).transpose(1, 2, 0)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class VLVForCaptioning(nn.Module, SupportsMultiModal):
    """Hold the encoder of the checkpoint, and its language model as vLLM runs it."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return what stands for an image in a chat's text: nothing, since the text is dropped."""
        return None

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        model, config = vllm_config.model_config, vllm_config.model_config.hf_config
        self.encoder = None
        if config.loads_encoder:
            # files of the folder: the encoder's first, then the language model's
            self.allow_patterns_overrides = ("encoder.safetensors",)
            self.secondary_weights = (DefaultModelLoader.Source(model.model, model.revision, "llm", LLM),)
            with self._mark_tower_model(vllm_config, "image"):
                self.encoder = VLVEncoder(VLVConfig.from_dict(config.encoder)).requires_grad_(False)
        with self._mark_language_model(vllm_config):
            # without a prefix: a quantised folder names its layers as if it were loaded alone
            self.language_model = init_vllm_registered_model(vllm_config, prefix=prefix, hf_config=config.text_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load both parts; return the names of the loaded parameters, which vLLM compares with its own list."""
        if self.encoder is None:
            return {f"language_model.{name}" for name in self.language_model.load_weights(weights)}
        encoder = {}

        def of_llm():
            for name, tensor in weights:
                if name.startswith(LLM):
                    yield name.removeprefix(LLM), tensor
                else:
                    encoder[name] = tensor

        loaded = self.language_model.load_weights(of_llm())
        self.encoder.load_state_dict(encoder)
        with set_default_torch_dtype(torch.float32), self.encoder.device:  # in float32 whatever the weights' type
            self.encoder.init_buffers()
        return {f"language_model.{name}" for name in loaded} | {f"encoder.{name}" for name in encoder}

    def embed_multimodal(self, **kwargs) -> Tensor:
        """Return prompt embeddings [B, queries, llm_width] of crops uint8 [B, 3, S, S], or `embeds` as they are."""
        if self.encoder is None:
            return kwargs["embeds"]
        return torch.cat([self.encoder(crops) for crops in kwargs["crops"].split(BATCH)])

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs) -> Tensor:
        """Return hidden states [T, llm_width] of the tokens of all requests, concatenated."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits [T, vocabulary] of hidden states [T, llm_width]."""
        return self.language_model.compute_logits(hidden_states)
