"""Handwritten digits for the example recipes: MNIST-5k, read from the package that ships it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.first_cut.data import mnist_5k
from examples.first_cut.nets import LeNet300100


class Digits:
    """A stratified split by seed; batches in an order drawn from a generator."""

    def __init__(self, seed: int, train: int, batch: int) -> None:
        every = mnist_5k()
        generator = torch.Generator().manual_seed(seed)
        index = [
            digit[torch.randperm(len(digit), generator=generator)]
            for digit in ((every.labels == d).nonzero().flatten() for d in range(10))
        ]
        first = torch.cat([i[: train // 10] for i in index])
        rest = torch.cat([i[train // 10 :] for i in index])
        self.inputs, self.labels, self.batch = every.images[first], every.labels[first], batch
        self.test = every.images[rest], every.labels[rest]

    def train(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        """One epoch."""
        order = torch.randperm(len(self.labels), generator=generator)
        return [(self.inputs[i], self.labels[i]) for i in order.split(self.batch)]


def digits(seed: int, train: int = 4000, batch: int = 64) -> Digits:
    """MNIST-5k: ``train`` pictures to train on, the others to test."""
    return Digits(seed, train, batch)


def lenet() -> LeNet300100:
    """LeNet-300-100."""
    return LeNet300100()
