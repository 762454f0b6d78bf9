"""Print verification figures as a table."""

from __future__ import annotations

from collections.abc import Iterable

from export.manifest import Artifact
from vlv.common.table import table as text_table

HEAD = ("artifact", "precision", "output", "max error", "rms error", "allowed", "batches", "captions", "verdict")


def table(artifacts: Iterable[Artifact]) -> str:
    """Return the figures of artifacts as text, one line per output."""
    rows = []
    for artifact in artifacts:
        figures = artifact.verification
        captions = figures.get("captions") or {}
        for name, errors in _join_layers(figures.get("outputs", {})).items():
            rows.append(
                (
                    artifact.name,
                    artifact.precision,
                    name,
                    f"{errors['max']:.1e}",
                    f"{errors['rms']:.1e}",
                    f"{figures['allowed']['rms']:.1e}",
                    ",".join(map(str, figures["batches"])),
                    f"{captions['agreement']:.1%}" if captions else "-",
                    "drifts" if figures["problems"] else "ok",
                )
            )
        if not figures:
            rows.append((artifact.name, artifact.precision, *["-"] * 6, "not run here"))
    return text_table(HEAD, rows)


def _join_layers(outputs: dict[str, dict]) -> dict[str, dict]:
    """Join the keys and values of all layers in one row."""
    layers = [errors for name, errors in outputs.items() if name.startswith("kv_")]
    if not layers:
        return outputs
    return {f"kv ({len(layers)})": {key: max(errors[key] for errors in layers) for key in ("max", "rms")}}


def gguf_table(artifacts: Iterable[Artifact]) -> str:
    """Return the figures of language models in GGUF as text, one line per file."""
    head = ("artifact", "MB", "tokens", "floor", "captions equal", "objects", "count", "relation", "verdict")
    rows = []
    for artifact in artifacts:
        figures = artifact.verification
        size = sum(file["bytes"] for file in artifact.files.values())
        claims = [f"{figures['claims'][name]:.1%}" for name in ("objects", "count", "relation")]
        equal = f"{figures['captions_equal']} of {figures['scenes']}"
        verdict = "drifts" if figures["problems"] else "ok"
        tokens = (f"{figures['agreement']:.2%}", f"{figures['floor']:.2%}")
        rows.append((artifact.name, f"{size / 1e6:.1f}", *tokens, equal, *claims, verdict))
    return text_table(head, rows)
