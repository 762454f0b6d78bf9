"""Build artifacts from a checkpoint: verified ONNX graphs, and TensorRT engines from them."""
