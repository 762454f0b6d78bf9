"""Compare generated images with the originals, over a sweep of the guidance and with controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlv.common.command import say
from vlv.evaluate.metrics.distances import distances
from vlv.evaluate.metrics.features import FeatureNet
from vlv.evaluate.metrics.lpips import LPIPS
from vlv.evaluate.reconstructions.generate import ImageSet, crops, read_images

EXAMPLES = 8  # images of each set that the report shows


class Comparison:
    """Distances of image sets to the originals; holds the originals' features, and one batch of images."""

    def __init__(self, originals: list[Path], nets: dict[str, Path], lpips: Path | None, batch: int, device: str):
        """`nets`: feature nets by name; `lpips`: VGG16's weights, None to leave LPIPS out. Raises EvaluationError."""
        self.nets = {name: FeatureNet(path, device) for name, path in nets.items()}
        self.lpips = LPIPS.load(lpips) if lpips else None
        self.originals = originals
        self.batch = batch
        self.size: int | None = None  # of the generated images; the originals' features are computed at this size
        self.real: dict[str, Tensor] = {}

    def __call__(self, files: list[Path]) -> dict:
        """Return all distances of generated images, in the originals' order."""
        if self.size is None:
            self.size = read_images(files[:1]).shape[-1]
            self.real, _ = self._walk(lambda part: crops(self.originals[part], self.size))
            for name, features in self.real.items():
                if len(features) <= features.shape[1]:
                    say(f"{name}: {len(features)} images for {features.shape[1]} features: `frechet` is biased")
        generated, lpips = self._walk(lambda part: read_images(files[part], self.size), compare=self.lpips is not None)
        found = {name: distances(self.real[name], generated[name]) for name in self.nets}
        return found | ({"lpips": sum(lpips) / len(lpips)} if lpips else {})

    def _walk(self, images: Callable[[slice], Tensor], compare: bool = False) -> tuple[dict, list[float]]:
        """Return features [N, D] by net, and LPIPS to each original, of images that come a batch at a time."""
        features, lpips = {name: [] for name in self.nets}, []
        for i in range(0, len(self.originals), self.batch):
            part = slice(i, i + self.batch)
            batch = images(part)
            for name, net in self.nets.items():
                features[name].append(net(batch))
            if compare:
                lpips += self.lpips(crops(self.originals[part], self.size), batch).tolist()
        return {name: torch.cat(parts) for name, parts in features.items()}, lpips


def sweep(
    comparison: Comparison, source: ImageSet | Path, names: list[str], guidance: list[float], shuffled: bool = False
) -> Iterator[dict]:
    """Yield `rows` of distances and `examples` of files, each time with one more set of images.

    `source`: a set to generate at every guidance, or a folder of images that exist already; `shuffled`: also two
    controls at the first guidance.
    """
    shown = [str(f) for f in comparison.originals[:EXAMPLES]]
    rows, examples = [], [{"label": "original", "files": shown}]
    for label, folder in _sets(source, guidance, shuffled):
        files = [folder / f"{name}.png" for name in names]
        rows.append(label | comparison(files))
        say(json.dumps(rows[-1]))
        title = "drawn" if label["guidance"] is None else f"guidance {label['guidance']:g} {label['control']}".strip()
        examples.append({"label": title, "files": [str(f) for f in files[:EXAMPLES]]})
        if shuffled and label == {"guidance": guidance[0], "control": ""}:
            rows.append(label | {"control": "another image's embeddings"} | comparison(files[-1:] + files[:-1]))
        yield {"rows": rows, "examples": examples}


def _sets(source: ImageSet | Path, guidance: list[float], shuffled: bool) -> Iterator[tuple[dict, Path]]:
    if isinstance(source, Path):
        yield {"guidance": None, "control": ""}, source
        return
    for value in guidance:
        for mixed in (False, True) if shuffled and value == guidance[0] else (False,):
            control = "mixed embeddings" if mixed else ""
            yield {"guidance": value, "control": control}, source.folder(value, mixed)
