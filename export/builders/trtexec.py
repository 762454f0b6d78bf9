"""Write the trtexec commands that build a checkpoint's engines on a device where this package does not run."""

from __future__ import annotations

import shlex

from export.builders.onnx import ExportConfig, components_of
from export.builders.tensorrt import EngineConfig
from export.components import COMPONENTS, Batch
from export.graphs import skeleton
from vlv.checkpoints.folder import Checkpoint

JETSON = {
    "sm53": "Jetson Nano and TX1",
    "sm62": "Jetson TX2",
    "sm72": "Jetson Xavier",
    "sm87": "Jetson Orin",
    "sm110": "Jetson Thor",
}


def commands(config: ExportConfig, engine: EngineConfig, checkpoint: Checkpoint) -> list[str]:
    """Return the command that exports to ONNX here, and one trtexec command per component for the device.

    Reads the checkpoint's configuration, not its weights. trtexec builds strongly typed: the precision is the graph's.
    The graphs have no plugin nodes. Raises Misuse for a component that the checkpoint lacks.
    """
    names = components_of(config, checkpoint)
    words = ["python", "-m", "export.onnx", "--ckpt", config.ckpt, "--out", str(config.out), "--components", *names]
    words += ["--precision", config.precision, "--max-batch", str(config.max_batch)]
    lines = [shlex.join([*words, "--max-images", str(config.max_images)])]
    for name in names:
        profile = COMPONENTS[name].profile(Batch.up_to(config.max_batch), Batch.up_to(config.max_images, 2))
        ports = [port for port in skeleton(checkpoint, name).inputs if port.batched]
        line = ["trtexec", f"--onnx={name}.onnx", f"--saveEngine={name}.trt-{engine.target}.engine", "--stronglyTyped"]
        for kind, size in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
            shapes = ",".join(f"{port.name}:{'x'.join(map(str, port.at(size)))}" for port in ports)
            line.append(f"--{kind}Shapes={shapes}")
        lines.append(shlex.join([*line, "--skipInference"]))
    return lines
