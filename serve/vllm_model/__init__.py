"""Run VLV as one of vLLM's multimodal models."""
