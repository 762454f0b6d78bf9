"""Captions against reference captions: BLEU, ROUGE-L and CIDEr, by pycocoevalcap's own scorers.

    python -m vlv.evaluate references --captions ours=captions.jsonl --references captions_val2014.json -o scores.json

pycocoevalcap starts Java for its tokenizer only; the tokenizer here splits and cleans plain English text the same way.
No SPICE and no METEOR: both are Java programs with models of their own. VLV's captions are paragraphs, and these
scores, made for single sentences, reward their length little: compare systems of one kind with them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path

from vlv.evaluate import caption_files, cli

# what the COCO tokenizer drops after splitting
_DROPPED = {"''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_CLITICS = re.compile(r"(?i)(n't|'s|'re|'ve|'ll|'d|'m)\b")
_TOKEN = re.compile(
    r"\.\.\.|--"  # dropped as they are
    r"|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\d+(?:[.,:]\d+)+(?:[-/]\w+)*"  # 3.5, 1,000, 10:30, 3.5-inch
    r"|(?:[a-z]\.){2,}"  # u.s.
    r"|\w+(?:[-/'&]\w+)*|\S"
)


def parser() -> cli.Parser:
    p = cli.Parser("references", __doc__)
    p.add_argument("--captions", type=cli.named, nargs="+", required=True, metavar="NAME=FILE", help="systems")
    p.add_argument("--references", type=Path, required=True, metavar="FILE", help="COCO annotations, or JSON lines")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser(), lambda args: _evaluate(args, argv), argv)


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    references = caption_files.read_several(args.references)
    systems = {name: by_reference(caption_files.read(path), references) for name, path in args.captions}
    keys = caption_files.common(systems, set(references))
    rows = {
        name: score({k: texts[k] for k in keys}, {k: references[k] for k in keys}) for name, texts in systems.items()
    }
    cli.write(cli.results("references", argv) | {"images": len(keys), "rows": rows}, args.out)
    return 0


def by_reference(texts: dict[str, str], references: dict[str, list[str]]) -> dict[str, str]:
    """Captions under the references' keys: where those are COCO's numbers, by the number that ends the file name."""
    if set(texts) & set(references) or not all(key.isdigit() for key in references):
        return texts
    ends = {key: re.search(r"\d+$", key) for key in texts}
    return {str(int(ends[key][0])): text for key, text in texts.items() if ends[key]}


def tokenize(text: str) -> str:
    """Lower-case words, split as the Penn Treebank splits them, without punctuation."""
    spaced = _CLITICS.sub(r" \1", text.lower().replace("\n", " "))
    return " ".join(t for t in _TOKEN.findall(spaced) if t not in _DROPPED and t not in '()[]{}"')


def score(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    """BLEU-1 to -4 of the corpus, mean ROUGE-L and CIDEr (CIDEr-D), over equal keys. CIDEr needs several images."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = {k: [tokenize(text)] for k, text in captions.items()}
    known = {k: [tokenize(text) for text in texts] for k, texts in references.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print; stdout is for the results
        bleu, _ = Bleu(4).compute_score(known, said)
        rouge, _ = Rouge().compute_score(known, said)
        cider, _ = Cider().compute_score(known, said)
    found = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return found | {"rouge_l": float(rouge), "cider": float(cider)}
