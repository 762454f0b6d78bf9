"""Evaluation: python -m vlv.evaluate COMMAND ...; docs/evaluation.md describes the commands."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "scenes": "held-out synthetic scenes: are captions true, do reconstructions show the objects",
    "images": "FID, KID, CMMD, similarity and LPIPS of reconstructions over a guidance sweep",
    "judge": "captions judged by an OpenAI-compatible model: rubric, and blind pairs",
    "vqa": "a language model answers VQAv2 or OK-VQA questions from the captions alone",
    "layout": "where things are: boxes read from embeddings and from captions",
    "references": "BLEU, ROUGE-L and CIDEr against reference captions",
    "report": "one self-contained HTML page of the other commands' results",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m vlv.evaluate COMMAND ... (COMMAND --help shows its options)\n")
        print("\n".join(f"  {name:<11} {about}" for name, about in COMMANDS.items()))
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: no command {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"vlv.evaluate.{words[0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
