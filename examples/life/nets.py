"""Networks of the recipes and studies."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from examples.first_cut.nets import LeNet300100


def lenet() -> LeNet300100:
    """LeNet-300-100: 266,200 weights."""
    return LeNet300100()


def small_lenet(density: float) -> nn.Module:
    """LeNet with narrower layers, and about as many parameters as LeNet-300-100 has left where this share of its weights is."""
    target = 266_200 * density + 410  # biases are not pruned

    def parameters(width: int) -> int:
        return 785 * width + (width + 1) * _third(width) + 10 * (_third(width) + 1)

    width = min(range(1, 301), key=lambda w: abs(parameters(w) - target))
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, _third(width)), nn.ReLU(), nn.Linear(_third(width), 10)),
    )


def _third(width: int) -> int:
    return max(1, round(width / 3))


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem and three residual blocks for 28x28 pictures: 77,072 weights, 2.6 M multiply-adds a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``(n, 1, 28, 28)`` to logits ``(n, 10)``."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def small_resnet() -> SmallResNet:
    """A small residual network, the stand-in for ResNet-50."""
    return SmallResNet()
