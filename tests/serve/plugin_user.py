"""A user of vLLM who knows nothing of us: python plugin_user.py FOLDER ANSWERS.json IMAGE... (for test_vllm_plugin).

Runs outside the repository, so that VLV is what vLLM's entry points find, in this process and in the engine's.
"""

import json
import sys


def main() -> None:
    import numpy as np
    from PIL import Image
    from vllm import LLM

    folder, answers, *images = sys.argv[1:]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=16, kv_cache_memory_bytes=64 << 20)

    def ask(images, text: str = "") -> list[list[int]]:
        outputs = llm.generate([{"prompt": text, "multi_modal_data": {"image": image}} for image in images])
        return [list(output.outputs[0].token_ids) for output in outputs]

    def refusal(image) -> str:
        try:
            return str(ask([image]))
        except Exception as error:
            return str(error)

    first = Image.open(images[0])
    chat = [{"role": "user", "content": [{"type": "image_pil", "image_pil": first}, {"type": "text", "text": "Hi"}]}]
    found = {
        "tokens": ask([Image.open(image) for image in images]),
        "with text": ask([first], "What is this?"),
        "array": ask([np.array(first.convert("RGB"))]),
        "chat": [list(output.outputs[0].token_ids) for output in llm.chat(chat)],
        "two": refusal([first, first]),
        "floats": refusal(np.zeros((64, 64, 3), np.float32)),
        "after": ask([first]),
    }
    with open(answers, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
