"""What runs an export: PyTorch, ONNX Runtime, TensorRT, TensorRT-RTX, behind one signature."""
