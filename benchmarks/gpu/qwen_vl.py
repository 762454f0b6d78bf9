"""What a user would caption with instead: Qwen2.5-VL-3B in vLLM, with random weights of its sizes.

Sizes: config.json of huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct. vLLM makes the weights itself (`load_format="dummy"`);
the tokenizer is made here, with the special tokens at their ids.
"""

from __future__ import annotations

import time
from pathlib import Path

TEXT = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION = {"hidden_size": 1280, "out_hidden_size": 2048}  # the others are the class's defaults
SPECIAL = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
    "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
}  # fmt: skip
PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe with a paragraph what is shown in the image."
    "<|im_end|>\n<|im_start|>assistant\n"
)


def write(folder: Path, text: dict = TEXT, vision: dict = VISION) -> None:
    """Write what vLLM reads beside the weights."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"token{number}" for number in range(len(words), max(SPECIAL.values()) + 1)]
    for token, number in SPECIAL.items():
        words[number] = token
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Qwen2Tokenizer(vocab, [], pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert all(tokenizer.convert_tokens_to_ids(token) == number for token, number in SPECIAL.items())
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16")
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def captions_per_second(folder: Path, files: list[Path], tokens: int, in_flight: int) -> dict:
    """Caption files by vLLM's offline interface, which opens them as they come; the first eighth is the warm-up."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    write(folder)
    start = time.monotonic()
    llm = LLM(
        str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=in_flight,
        limit_mm_per_prompt={"image": 1},
        gpu_memory_utilization=0.9,
    )
    loaded = time.monotonic() - start
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def caption(part: list[Path]) -> None:
        prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": Image.open(file)}} for file in part]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)

    warm = len(files) // 8
    caption(files[:warm])
    start = time.monotonic()
    caption(files[warm:])
    seconds = time.monotonic() - start
    return {
        "captions_per_s": (len(files) - warm) / seconds,
        "images": len(files) - warm,
        "in_flight": in_flight,
        "start_s": round(loaded, 1),
    }
