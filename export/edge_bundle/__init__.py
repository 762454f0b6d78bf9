"""Make the edge bundle: one folder that captions images without PyTorch, vLLM or this package."""
