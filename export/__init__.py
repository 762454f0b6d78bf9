"""Checkpoints as ONNX graphs and TensorRT engines: exported, verified against float32 PyTorch, and run."""
