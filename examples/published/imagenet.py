"""ImageNet from a local folder for ResNet-50: pictures read with Pillow, every epoch the same whenever it is run again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, red, green, blue, in 0 to 1; the weights others trained expect them."""
SUFFIXES = (".jpeg", ".jpg", ".png")
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Of the random crop: its share of the picture, width to height, and how often one that does not fit is drawn again."""
Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels."""


@dataclass(frozen=True)
class Views(Dataset[dict[str, Any]]):
    """Pictures as a network sees them, in an order.

    Attributes:
        files, labels: of every picture.
        order: which picture comes when.
        size: pixels of a side of the view.
        seed: draws crop and flip, together with the picture's number; ``None`` takes the centre.
    """

    files: Sequence[Path]
    labels: Sequence[int]
    order: Sequence[int]
    size: int
    seed: int | None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """``pixel_values`` ``(3, size, size)`` float32, normalised, and ``labels``."""
        from PIL import Image

        number = self.order[place]
        flip = False
        try:
            with Image.open(self.files[number]) as opened:
                picture = opened.convert("RGB")
        except OSError as e:
            raise ValueError(f"{self.files[number]} is not a picture that Pillow can read: {e}") from None
        if self.seed is None:
            box = centre(*picture.size, self.size)
        else:
            draw = random.Random(f"{self.seed} {number}")  # of text: numbers that differ by one give unrelated streams
            box, flip = crop(*picture.size, draw), draw.random() < 0.5
        seen = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
        return {"pixel_values": pixels.flip(2) if flip else pixels, "labels": self.labels[number]}


def crop(width: int, height: int, draw: random.Random) -> Box:
    """A random part of a picture: its area and its shape are drawn, then its place; the middle if none fits."""
    for _ in range(TRIES):
        area = width * height * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return _middle(width, height, w, h)


def centre(width: int, height: int, size: int) -> Box:
    """The middle square of ``size`` pixels of a picture whose shorter side is scaled to 8/7 of that: 224 of 256."""
    side = min(width, height) * 7 / 8
    return _middle(width, height, side, side)


def _middle(width: int, height: int, w: float, h: float) -> Box:
    left, upper = (width - w) / 2, (height - h) / 2
    return left, upper, left + w, upper + h


@dataclass(frozen=True)
class ImageNet:
    """A training part, and a test part that is only scored; batches are arguments of a model of transformers."""

    files: Sequence[Path]
    labels: Sequence[int]
    test: DataLoader[dict[str, Any]]
    size: int
    batch: int
    workers: int

    def train(self, generator: torch.Generator) -> DataLoader[dict[str, Any]]:
        """One epoch: order, crops and flips are drawn from the generator; a last batch that is not full is left out."""
        order = torch.randperm(len(self.files), generator=generator).tolist()
        seed = int(torch.randint(1 << 62, (), generator=generator))
        views = Views(self.files, self.labels, order, self.size, seed)
        return _loader(views, self.batch, self.workers, drop_last=True)


def imagenet(seed: int, folder: str, batch: int = 256, size: int = 224, workers: int = 8) -> ImageNet:
    """ImageNet, or any pictures in its layout: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.

    Classes are numbered in the order of their names, which is that of the weights others trained.

    Args:
        seed: the recipe's; the pictures are the same for all.
        folder: where ``train`` and ``val`` lie.
        batch: pictures a batch.
        size: pixels of a side.
        workers: processes that read pictures; 0 reads them in this one.

    Raises:
        ModuleNotFoundError: Pillow is not installed; the message holds the pip line.
        FileNotFoundError: a part, or the pictures of a class, are not there.
        ValueError: the two parts have other classes.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError("ImageNet's pictures are read with Pillow: pip install pillow") from None
    root = Path(folder)
    names, files, labels = _listed(root / "train")
    others, tested, answers = _listed(root / "val")
    if names != others:
        odd = sorted(set(names) ^ set(others))
        raise ValueError(
            f"train and val in {root} have {len(names)} and {len(others)} classes; not in both: {odd[:3]}."
        )
    views = Views(tested, answers, range(len(tested)), size, None)
    return ImageNet(files, labels, _loader(views, batch, workers, drop_last=False), size, batch, workers)


def _listed(part: Path) -> tuple[list[str], list[Path], list[int]]:
    """The classes of a part, its pictures and their classes."""
    if not part.is_dir():
        raise FileNotFoundError(
            f"there is no folder {part}: ImageNet's layout is train/<class>/*.JPEG and val/<class>/*.JPEG."
        )
    names = sorted(p.name for p in part.iterdir() if p.is_dir())
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(p for p in (part / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{part / name} holds no pictures ({', '.join(SUFFIXES)}).")
        files += found
        labels += [label] * len(found)
    return names, files, labels


def _loader(views: Views, batch: int, workers: int, drop_last: bool) -> DataLoader[dict[str, Any]]:
    # A generator of its own: a loader draws a seed for its workers, and must not draw it from the one the network uses.
    return DataLoader(views, batch, num_workers=workers, drop_last=drop_last, generator=torch.Generator())


def smoothed(model: nn.Module, batch: Any, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with label smoothing, of a mapping as of (inputs, labels)."""
    if isinstance(batch, Mapping):
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], label_smoothing=smoothing)
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)
