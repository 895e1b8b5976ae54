"""Two small networks for 28x28 digits, and how they are trained and scored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.first_cut.data import Part, Split
from examples.first_cut.settings import Settings


class LeNet300100(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998): three fully connected layers, 266,200 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, 1, 28, 28)`` to logits ``(n, 10)``."""
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class Conv4BN(nn.Module):
    """Four 3x3 convolutions, each with BatchNorm, then one linear layer: 60,688 weights."""

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
            return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)

        self.conv1, self.bn1 = conv(1, 16, 2)
        self.conv2, self.bn2 = conv(16, 32, 2)
        self.conv3, self.bn3 = conv(32, 64, 2)
        self.conv4, self.bn4 = conv(64, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, 1, 28, 28)`` to logits ``(n, 10)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Kind:
    """A network of the sweep: its key in the report, its name, what it is made of, and its class."""

    key: str
    title: str
    about: str
    build: Callable[[], nn.Module]


KINDS = (
    Kind("lenet", "LeNet-300-100", "Three fully connected layers", LeNet300100),
    Kind("cnn", "Conv4-BN", "Four convolutions, each with BatchNorm, and one linear layer", Conv4BN),
)


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there are running statistics to recalibrate."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share of ``part`` classified right, 0 to 1, in evaluation mode; ``model`` keeps the mode it had."""
    was_training = model.training
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(part.images.split(250), part.labels.split(250), strict=True)
    )
    model.train(was_training)
    return right / len(part.labels)


def train(kind: Kind, split: Split, seed: int, settings: Settings, step: Callable[[], None]) -> tuple[nn.Module, int]:
    """Trains a network of one kind and returns it, in evaluation mode, with the epoch it was taken from.

    AdamW under one learning-rate cycle. The epoch kept is the first with the highest *validation* accuracy;
    the test part is never looked at. ``step`` is called once an epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.build()
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = split.train.images, split.train.labels
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = settings.epochs * -(-len(labels) // settings.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    best, best_epoch, best_state = -1.0, 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for index in torch.randperm(len(labels), generator=shuffle).split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            cycle.step()
        score = accuracy(model, split.validation)
        if score > best:
            best, best_epoch, best_state = score, epoch, copy.deepcopy(model.state_dict())
        step()
    model.load_state_dict(best_state)
    return model.eval(), best_epoch
