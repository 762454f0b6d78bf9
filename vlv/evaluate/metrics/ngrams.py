"""BLEU, ROUGE-L and CIDEr by pycocoevalcap's own scorers, on text that is tokenized here."""

from __future__ import annotations

import contextlib
import io
import re

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

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


def tokenize(text: str) -> str:
    """Return lower-case words, split as the Penn Treebank splits them, without punctuation."""
    spaced = _CLITICS.sub(r" \1", text.lower().replace("\n", " "))
    return " ".join(t for t in _TOKEN.findall(spaced) if t not in _DROPPED and t not in '()[]{}"')


def score(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    """Return BLEU-1 to -4 of the corpus, mean ROUGE-L and CIDEr (CIDEr-D), by equal keys; CIDEr needs two images."""
    candidates = {k: [tokenize(text)] for k, text in captions.items()}
    known = {k: [tokenize(text) for text in texts] for k, texts in references.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print; stdout is for the results
        bleu, _ = Bleu(4).compute_score(known, candidates)
        rouge, _ = Rouge().compute_score(known, candidates)
        cider, _ = Cider().compute_score(known, candidates)
    found = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return found | {"rouge_l": float(rouge), "cider": float(cider)}
