"""Artifacts against float32 PyTorch: inputs, checks, and where a graph drifts."""
