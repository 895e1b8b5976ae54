"""Small pictures for the recipes and studies: Fashion-MNIST, MNIST, or MNIST-5k; read where they lie, copied nowhere."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.first_cut.data import mnist_5k

HELD = 5000
"""Pictures of a training part that are neither trained on nor tested on, where there are so many to spare."""
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's ``dataset-fashion-mnist`` puts its files."""


@dataclass
class Pictures:
    """A training part and a test part of ``(n, 1, 28, 28)`` float32, normalised by the mean and deviation of the training part.

    Attributes:
        name: what they are.
        inputs, labels: the training part.
        test: inputs and labels of the test part, which decides nothing and is only scored.
        batch: pictures a batch.
        validation: inputs and labels to choose by, of the training part but not trained on; ``None`` where none are left.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    test: tuple[Tensor, Tensor]
    batch: int
    validation: tuple[Tensor, Tensor] | None = None

    def train(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        """The batches of one epoch, in an order drawn from the generator."""
        order = torch.randperm(len(self.labels), generator=generator)
        return [(self.inputs[i], self.labels[i]) for i in order.split(self.batch)]


def pictures(seed: int, train: int = 10_000, batch: int = 64, folder: str | None = None) -> Pictures:
    """Pictures to classify into ten classes.

    ``folder`` holds the four ``*-ubyte`` or ``*-ubyte.gz`` files of MNIST or one of its relatives; without it, Debian's
    Fashion-MNIST if it is installed, else MNIST-5k. Of the pictures that are left over some are kept to choose by, if there are
    enough.

    Args:
        seed: draws which pictures of the training part are used (of MNIST-5k, also which are left for the test).
        train: how many pictures to train on, the same number of each class; of MNIST-5k at most 4,000.
        batch: pictures a batch.
        folder: where the files lie.

    Raises:
        FileNotFoundError: a folder without the four files.
        ValueError: a file that is not what its name says.
    """
    place = Path(folder) if folder is not None else FASHION
    if folder is None and not place.is_dir():
        every = mnist_5k()
        used, rest = _share_out(every.labels, min(train, 4000), seed)
        test = every.images[rest], every.labels[rest]
        return Pictures("MNIST-5k", every.images[used], every.labels[used], test, batch)
    labels = _idx(place, "train-labels-idx1-ubyte").long()
    used, rest = _share_out(labels, train, seed)
    raw = _idx(place, "train-images-idx3-ubyte")
    mean, deviation = float(raw[used].float().mean()), float(raw[used].float().std())

    def normalised(some: Tensor) -> Tensor:
        return ((some.float() - mean) / deviation).unsqueeze(1)

    test = normalised(_idx(place, "t10k-images-idx3-ubyte")), _idx(place, "t10k-labels-idx1-ubyte").long()
    spare = rest[_share_out(labels[rest], HELD, seed)[0]]
    validation = (normalised(raw[spare]), labels[spare]) if len(spare) >= HELD else None
    name = "Fashion-MNIST" if place == FASHION else place.name
    return Pictures(name, normalised(raw[used]), labels[used], test, batch, validation)


def _share_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of ``count`` pictures, the same number of each class where there are enough of them, and of the others."""
    generator = torch.Generator().manual_seed(seed)
    index = [
        where[torch.randperm(len(where), generator=generator)]
        for where in ((labels == c).nonzero().flatten() for c in range(10))
    ]
    each = count // 10
    return torch.cat([i[:each] for i in index]), torch.cat([i[each:] for i in index])


def _idx(folder: Path, name: str) -> Tensor:
    """An IDX file of unsigned bytes as a tensor of its shape."""
    path = folder / name
    if path.exists():
        raw = path.read_bytes()
    elif (zipped := folder / f"{name}.gz").exists():
        raw = gzip.decompress(zipped.read_bytes())
    else:
        raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz.")
    dims = raw[3] if raw[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(raw[4 + 4 * d : 8 + 4 * d]) for d in range(dims)]
    body = raw[4 + 4 * dims :]
    if not shape or len(body) != math.prod(shape):
        raise ValueError(f"{path} is not an IDX file of bytes: shape {shape}, {len(body)} bytes after the head.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)
