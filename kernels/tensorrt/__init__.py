"""The operations as ONNX nodes and as TensorRT plugins."""
