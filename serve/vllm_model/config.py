"""Define what vLLM reads from the config.json of a folder that serve.vllm_plugin has written."""

from __future__ import annotations

import os

from transformers import AutoConfig, PretrainedConfig

from vlv.common.command import UserError

ARCHITECTURE = "VLVForCaptioning"
TESTED = ("0.26", "0.32")  # minor versions of vLLM, whose classes for multimodal models change between them
PLACEHOLDER = 0  # what stands in a prompt for an embedding: any token, its own embedding is never used
ANYWAY = "VLV_ANY_VLLM"  # environment variable: 1 tries another version


class VersionError(UserError, ValueError):
    """Raised for a version of vLLM that the plugin was not tested with."""


class CaptionerConfig(PretrainedConfig):
    """Configure encoder and language model. `encoder`: VLVConfig as a dict; `text_config`: the language model's.

    `loads_encoder`: False for a model that gets embeddings and no images.
    """

    model_type = "vlv"
    has_no_defaults_at_init = True

    def __init__(self, encoder: dict, text_config: dict | PretrainedConfig, loads_encoder: bool = True, **kwargs):
        """Read the configuration. Raises VersionError for a version of vLLM that was not tested."""
        require_tested()
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.encoder, self.text_config, self.loads_encoder = encoder, text_config, loads_encoder
        super().__init__(**kwargs)


def require_tested() -> None:
    """Raise VersionError unless this vLLM's minor version is in TESTED, or ANYWAY is set."""
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in TESTED and os.environ.get(ANYWAY) != "1":
        raise VersionError(
            f"VLV's plugin is tested with vLLM {', '.join(TESTED)}, and this is {__version__}: install one of these, "
            f"caption with serve.vllm_caption or serve.server, or try it with {ANYWAY}=1 and compare the captions"
        )
