"""List the commands of this package: python -m serve"""

from __future__ import annotations

COMMANDS = {
    "vllm_caption": "caption files, folders, lists and tar shards",
    "server": "serve captions over HTTP, as OpenAI's API",
    "gateway": "take embeddings over HTTP for a vLLM on this machine",
    "bench": "measure what a server sustains",
    "ray_batch": "caption more images than one machine can, on a Ray cluster",
    "ray_serve": "serve captions over HTTP from a Ray cluster",
    "vllm_plugin": "write a checkpoint as a folder for `vllm serve`",
}


def main() -> None:
    """Print one line per command."""
    for name, purpose in COMMANDS.items():
        print(f"python -m serve.{name:13} {purpose}")


if __name__ == "__main__":
    main()
