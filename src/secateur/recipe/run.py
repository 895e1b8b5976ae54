"""Runs a recipe: every cell, a seed, a method and a sparsity, is an artefact on disk, so that a run can be taken up."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import secateur
from secateur.core import schedules
from secateur.errors import BadInput
from secateur.stores.staging import staged
from secateur.train.engine import order_of, update
from secateur.train.rounds import WEIGHTS, artefact, load_state, locked

from .schema import Call, Choice, Finetune, Iterate, Method, Recipe, Training


class Data(Protocol):
    """What a recipe's ``data`` function returns for a seed."""

    test: tuple[Tensor, Tensor]

    def train(self, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of one epoch, (inputs, labels), with a length, in an order drawn from the generator."""
        ...


@dataclass(frozen=True)
class Cell:
    """What came out of one method at one sparsity with one seed."""

    seed: int
    method: str
    asked: float
    sparsity: float
    metrics: dict[str, float]
    epochs: int


Progress = Callable[[str, int, int], None]
"""``(what, done, total)``, called after every step."""


def quiet(what: str, done: int, total: int) -> None:
    """Progress for nobody."""


def resolve(call: Call) -> Callable[..., Any]:
    """The function a recipe names, with its arguments.

    Raises:
        BadInput: there is no such module or function.
    """
    module, _, name = call.call.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise BadInput(f"{call.call!r} cannot be found: {e}.") from None
    return lambda *a: function(*a, **call.args)


def accuracy(model: nn.Module, data: Data) -> dict[str, float]:
    """Share of the test part that is classified right, in percent; what ``evaluate`` is by default."""
    x, y = data.test
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return {"accuracy": 100 * right / len(y)}


def run(recipe: Recipe, progress: Progress = quiet) -> list[Cell]:
    """Runs what is not there yet, and returns every cell.

    Raises:
        BadInput: the folder is in use, or holds another recipe; a function of the recipe cannot be found.
    """
    for call in (recipe.data, recipe.model, recipe.evaluate, recipe.train.optimizer):
        if call is not None:
            resolve(call)
    root = Path(recipe.folder)
    with locked(root, recipe.model_dump(mode="json")):
        cells = [c for seed in recipe.seeds for c in _Seed(recipe, root / f"seed-{seed}", seed, progress).cells()]
        text = to_json(cells)
        with staged(root / "results.json", True, len(text)) as stage:
            stage.write_text(text, "utf-8")
    return cells


def to_json(cells: Iterable[Cell]) -> str:
    """Every cell."""
    return json.dumps([vars(c) for c in cells], indent=1)


class _Seed:
    """Everything that is done with one seed."""

    def __init__(self, recipe: Recipe, root: Path, seed: int, progress: Progress) -> None:
        self.recipe, self.root, self.seed, self.progress = recipe, root, seed, progress
        root.mkdir(exist_ok=True)
        self.data: Data = resolve(recipe.data)(seed)
        score = resolve(recipe.evaluate) if recipe.evaluate is not None else accuracy
        self._score = score

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model, in evaluation mode."""
        found: dict[str, float] = self._score(model, self.data)
        return found

    def model(self) -> nn.Module:
        """The network as the seed initialises it."""
        torch.manual_seed(self.seed)
        built: nn.Module = resolve(self.recipe.model)()
        return built

    def cells(self) -> Iterator[Cell]:
        """The dense network, then every method at every sparsity."""
        for method in self.recipe.methods.values():  # refused now what would be refused after hours of training
            secateur.Pruner(self.model(), **_choice(method.way)).close()
        yield self._cell("dense", 0.0, None)
        for name, method in self.recipe.methods.items():
            if method.iterate is not None:
                yield from self._iterated(name, method.iterate)
                continue
            for s in self.recipe.sparsities:
                yield self._cell(name, s, method)

    def _epochs(self, method: Method | None) -> int:
        again = 0 if method is None or method.finetune is None else method.finetune.epochs
        return self.recipe.train.epochs + again

    def _cell(self, name: str, asked: float, method: Method | None) -> Cell:
        """Reads a cell that is there, or makes it and puts it on disk, whole; ``None`` makes the dense network."""
        folder = self.root / name / f"{asked:g}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            model = self.model()
            if method is None:
                self._train(model, self.recipe.train, folder)
            sparsity = 0.0 if method is None else self._pruned(model, method, asked, folder)
            model.eval()
            with torch.no_grad():
                metrics = self.evaluate(model)
            with artefact(folder, model) as stage:
                cell = Cell(self.seed, name, asked, sparsity, metrics, self._epochs(method))
                (stage / "cell.json").write_text(json.dumps(vars(cell)), "utf-8")
        return Cell(**json.loads((folder / "cell.json").read_text("utf-8")))

    def _pruned(self, model: nn.Module, method: Method, sparsity: float, folder: Path) -> float:
        """Prunes, with the training that goes with it; the sparsity found at the end."""
        assert method.prune is not None
        choice = _choice(method.prune)
        if method.prune.schedule == "gradual":
            longer = Training(**{**self.recipe.train.model_dump(), "epochs": self._epochs(method)})
            self._train(model, longer, folder, sparsity, choice)
        else:
            load_state(model, load_file(self.root / "dense" / "0" / WEIGHTS))
            secateur.prune(model, sparsity, **choice)
            if method.finetune is not None:
                self._train(model, _again(self.recipe.train, method.finetune), folder, None, choice)
        return secateur.inspect(model, include=method.prune.include, ignore=method.prune.ignore).sparsity

    def _train(
        self,
        model: nn.Module,
        how: Training,
        folder: Path,
        target: float | None = None,
        choice: Mapping[str, Any] | None = None,
    ) -> None:
        """Trains with zeros held where ``choice`` is given, and pruned gradually where ``target`` is; a line a step."""
        steps = how.epochs * len(self.data.train(torch.Generator()))  # type: ignore[arg-type]
        optimizer = resolve(how.optimizer)(model.parameters())
        rate = LambdaLR(optimizer, lambda t: _rate(how.learning_rate, t, steps))
        schedule = None if target is None else schedules.auto(target, steps)
        pruner = None if choice is None else secateur.Pruner(model, optimizer, schedule, **choice)
        what = f"seed {self.seed}: {folder.parent.name}, {folder.name}"
        model.train()
        with folder.with_name(f"{folder.name}.jsonl").open("w", encoding="utf-8") as lines:
            for t, (x, y) in enumerate(_batches(self.data, self.seed, how.epochs)):
                loss = update(F.cross_entropy(model(x), y), optimizer, rate, f"{what}, step {t}")
                asked = 0.0 if schedule is None else schedule(t + 1)
                lines.write(json.dumps({"step": t + 1, "loss": loss, "sparsity": asked}) + "\n")
                self.progress(what, t + 1, steps)
        if pruner is not None:
            pruner.close()

    def _iterated(self, name: str, how: Iterate) -> Iterator[Cell]:
        """One run through all sparsities, with rounds between them."""
        asked = _between(self.recipe.sparsities, how.rounds)
        train = self.recipe.train
        per_epoch = len(self.data.train(torch.Generator()))  # type: ignore[arg-type]

        def make_optimizer(model: nn.Module) -> tuple[Any, Any]:
            optimizer = resolve(train.optimizer)(model.parameters())
            return optimizer, LambdaLR(optimizer, lambda t: _rate(train.learning_rate, t, train.epochs * per_epoch))

        choice = {**_choice(how), "criterion": "magnitude"}
        rounds = secateur.iterate(
            self.model(), self.root / name, make_optimizer=make_optimizer, make_data=self.data.train,
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), evaluate=self.evaluate,
            epochs=train.epochs, retrain_epochs=how.epochs, sparsities=asked, rewind=how.rewind, control=how.control,
            seed=self.seed, **choice,
        )  # fmt: skip
        spent = 0
        for r in rounds:
            spent += r.how["steps"] // per_epoch
            if r.asked in self.recipe.sparsities:
                yield Cell(self.seed, name, r.asked, r.sparsity, r.metrics, spent)


def _choice(how: Choice) -> dict[str, Any]:
    return how.model_dump(exclude={"schedule", "epochs", "rounds", "rewind", "control"})


def _again(train: Training, finetune: Finetune) -> Training:
    return Training(epochs=finetune.epochs, optimizer=train.optimizer, learning_rate=finetune.learning_rate)


def _batches(data: Data, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(epochs):
        yield from data.train(order_of(seed, epoch))


def _rate(kind: str, step: int, steps: int) -> float:
    if kind == "constant":
        return 1.0
    left = max(0.0, 1 - step / steps)
    return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def _between(sparsities: list[float], rounds: int) -> list[float]:
    """The sparsity of every round: from each to the next in ``rounds`` rounds that take the same share of what is left."""
    out, before = [], 0.0
    for s in sparsities:
        out += [1 - (1 - before) ** (1 - r / rounds) * (1 - s) ** (r / rounds) for r in range(1, rounds)]
        out.append(s)
        before = s
    return out
