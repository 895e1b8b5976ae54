"""Heads of MiniLM, by three criteria: the second half of the study ``structures``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from benchmarks.evidence import encoder
from benchmarks.evidence.common import cells, current, seeds_of, shown
from benchmarks.evidence.encoder import FULL, QUICK, TESTS, Size, Subject
from benchmarks.evidence.oneshot import Results, on_device
from benchmarks.result import Table
from examples.published import minilm
from secateur.core.saliency import Statistics
from secateur.evaluate.statistics import interval

AMOUNTS, ALLOCATIONS = ("0.3", "0.5"), ("global", "uniform")
METHODS = {"l1": "magnitude, l1", "l2": "magnitude, l2", "importance": "head importance", "random": "random"}
DRAWN = ("importance", "random")
"""What a seed changes."""
PAIRS = 32
"""Of a batch: the definitions that stand beside a noun's own."""
SCALE = 20.0
"""Of cosines, as in the loss that the encoder was trained with."""
DENSE = "heads-dense"


@dataclass(frozen=True)
class Point:
    """A criterion in an allocation, at an amount."""

    method: str
    allocation: str
    amount: str

    @property
    def name(self) -> str:
        """Of its cell."""
        return f"heads-{self.method}-{self.allocation}-{self.amount}"

    @property
    def title(self) -> str:
        """In tables."""
        return f"{float(self.amount):.0%}, {self.allocation}, {METHODS[self.method]}"

    def beside(self, method: str) -> str:
        """The cell of another criterion in the same place."""
        return Point(method, self.allocation, self.amount).name


POINTS = [Point(m, a, s) for s in AMOUNTS for a in ALLOCATIONS for m in METHODS]


def run_seed(seed: int, folder: Path, quick: bool, first: bool) -> dict[str, Any]:
    """Makes, or reads, the cells of a seed: all of the first seed, of others those that a seed changes."""
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {DENSE: partial(_dense, size)} if first else {}
    for point in POINTS:
        if first or point.method in DRAWN:
            makers[point.name] = partial(_pruned, seed, size, point)
    return cells(folder, makers, asdict(size))


# What is made


def _dense(size: Size) -> dict[str, Any]:
    subject = encoder.subject_of(size)
    return encoder.scored(subject.encoder.model, subject, size)


def _pruned(seed: int, size: Size, point: Point) -> dict[str, Any]:
    subject = encoder.subject_of(size)
    model = copy.deepcopy(subject.encoder.model)
    heads = model.config.num_attention_heads
    asked: dict[str, Any] = {"pattern": secateur.Head(heads)}
    if point.method == "random":
        asked["criterion"] = secateur.random(seed)
    elif point.method == "importance":
        asked |= {"criterion": "head_importance", "statistics": gradients(seed, size)}
    else:
        asked["pattern"] = secateur.Head(heads, reduce="l1" if point.method == "l1" else "l2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.SecateurWarning)  # a layer without a head: the scores tell
        report = secateur.prune(model, float(point.amount), allocation=point.allocation, **asked)
    layers = model.config.num_hidden_layers
    found = {"gone": round(report.zeros * heads * layers / report.total), "heads": heads * layers}
    return {**encoder.scored(model, subject, size), **found}


@lru_cache(1)
def gradients(seed: int, size: Size) -> Statistics:
    """What head importance is made of, on the nouns that the seed draws."""
    subject = encoder.subject_of(size)
    model = copy.deepcopy(subject.encoder.model).to(current().device)
    pattern = secateur.Head(model.config.num_attention_heads)
    calibration = secateur.Calibration(pairs(subject, size, seed), loss=contrast)
    found = secateur.calibrate(model, calibration, ["head_gradient"], pattern=pattern)
    return {name: {k: t.cpu() for k, t in values.items()} for name, values in found.items()}


def pairs(subject: Subject, size: Size, seed: int) -> list[tuple[Any, Any]]:
    """Nouns that the seed draws and their definitions, in batches of both."""
    drawn = encoder.drawn_nouns(subject, size, seed)
    chunks = [drawn[i : i + PAIRS] for i in range(0, len(drawn), PAIRS)]
    return [
        (_tokens(subject, [m.word for m in some]), _tokens(subject, [m.definition for m in some])) for some in chunks
    ]


def _tokens(subject: Subject, texts: list[str]) -> Any:
    return on_device(minilm.padded(subject.tokenizer(texts)["input_ids"], subject.tokenizer.pad_token_id))


def contrast(model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
    """Cross entropy of finding, for each definition, its own noun among those of the batch, by cosines.

    The two sides go through the network one after the other, and a factor on a head is one for both: an input is a pair.
    """
    words, definitions = (minilm.mean(model, side) for side in batch)
    return F.cross_entropy(SCALE * definitions @ words.T, torch.arange(len(words), device=words.device))


# What is told


def tables(results: Results) -> list[Table]:
    """Scores, differences from magnitude over what is tested, and from random heads over the draws of them."""
    points = [p for p in POINTS if any(p.name in r for r in results)]
    dense = next(r[DENSE] for r in results if DENSE in r)
    rows = [("dense", "0", *encoder.levels(results, DENSE))]
    rows += [(p.title, _gone(results, p), *encoder.levels(results, p.name)) for p in points]
    columns = tuple(f"{title} ({dense['scores'][t]['n']})" for t, title in TESTS.items())
    title = (
        f"{dense['model']} without heads: scores times 100; {seeds_of(results)}, mean ± half of the 95 % interval where a seed "
        "changes the criterion, else one run"
    )
    above = [
        (p.title, *(encoder.difference(results, p.name, p.beside("l1"), t) for t in TESTS)) for p in points if p.method != "l1"
    ]  # fmt: skip
    beyond = [
        (p.title, *(_above_random(results, p, t) for t in TESTS)) for p in points if p.method != "random"
    ]  # fmt: skip
    return [
        Table(title, ("<", "heads gone", *columns), rows),
        Table("Above magnitude, l1, times 100, with the 95 % interval over what is tested", ("<", *columns), above),
        Table(
            "Above random heads, times 100, mean ± half of the 95 % interval over the seeds", ("<", *columns), beyond
        ),
    ]


def _gone(results: Results, point: Point) -> str:
    return next(str(r[point.name]["gone"]) for r in results if point.name in r)


def _above_random(results: Results, point: Point, test: str) -> str:
    """A criterion above the random heads of each seed; the seed's own, where it changes the criterion."""
    once = next(r[point.name] for r in results if point.name in r)
    random = point.beside("random")
    found = [(r.get(point.name, once), r[random]) for r in results if random in r]
    differences = [100 * (a["scores"][test]["score"] - b["scores"][test]["score"]) for a, b in found]
    return shown(interval(differences), sign=True, digits=1)
