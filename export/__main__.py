"""List the commands of this package: python -m export"""

from __future__ import annotations

COMMANDS = {
    "onnx": "export a checkpoint to verified ONNX graphs",
    "trt": "build TensorRT-RTX or TensorRT engines",
    "gguf": "write the language model for llama.cpp, quantized and verified",
    "edge": "write a folder that captions images on a device",
    "verify": "compare artifacts with float32 PyTorch",
    "lint": "check ONNX graphs in seconds, before a build of minutes",
    "bench": "measure latency, throughput and memory of an exported encoder",
    "reconstruct": "reconstruct images through an exported model",
}


def main() -> None:
    """Print one line per command."""
    for name, purpose in COMMANDS.items():
        print(f"python -m export.{name:12} {purpose}")


if __name__ == "__main__":
    main()
