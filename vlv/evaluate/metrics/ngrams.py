"""BLEU, ROUGE-L and CIDEr by pycocoevalcap's own tokenizer and scorers."""

from __future__ import annotations

import contextlib
import io

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from vlv.evaluate.metrics.ptb_tokenizer import tokenize


def score(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    """Return BLEU-1 to -4 of the corpus, mean ROUGE-L and CIDEr (CIDEr-D), by equal keys; CIDEr needs two images.

    Raises EvaluationError without a Java runtime.
    """
    names = list(captions)
    # in two runs, as pycocoevalcap does
    candidates = {k: [text] for k, text in zip(names, tokenize([captions[k] for k in names]), strict=True)}
    tokens = iter(tokenize([text for k in names for text in references[k]]))
    known = {k: [next(tokens) for _ in references[k]] for k in names}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print; stdout is for the results
        bleu, _ = Bleu(4).compute_score(known, candidates)
        rouge, _ = Rouge().compute_score(known, candidates)
        cider, _ = Cider().compute_score(known, candidates)
    found = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return found | {"rouge_l": float(rouge), "cider": float(cider)}
