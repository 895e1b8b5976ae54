"""Everything a recipe does with one seed: the dense network, and each method at each sparsity, as artefacts on disk."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from secateur.core import schedules
from secateur.errors import BadInput, SecateurWarning
from secateur.report.run_facts import DENSE, Cell, most
from secateur.report.run_files import CELL, TAKEN, Both, read_cell
from secateur.stores.staging import staged
from secateur.train.engine import Engine, Run, Settings, numbers_of, order_of
from secateur.train.randomness import seed_all
from secateur.train.rounds import WEIGHTS, Round, artefact, load_state, read_tensors

from .measure import Meter, Taken, digest, example_of, flops_of
from .schema import Call, Choice, Dense, Iterate, Method, Prune, Recipe, Sparse, Training
from .training import Data, Progress, Pruned, Trainer, accuracy, device_of, log, loss_of, moved, resolve
from .ways import (
    begun,
    between,
    choice_of,
    control_of,
    density_of,
    epochs_of,
    schedule_for,
    training_of,
    way_of,
    with_data,
)


@dataclass
class _Made:
    """A network, what it began with, and what it took."""

    model: nn.Module
    begins: dict[str, str] = field(default_factory=dict)
    dense: float = 0.0
    pruning: float = 0.0
    training: float = 0.0
    peak: int | None = None
    whole: bool = True

    def add(self, taken: Taken) -> None:
        """A training, after what there was."""
        self.training += taken.seconds
        self.peak = most(self.peak, taken.peak)
        self.whole = self.whole and taken.whole
        if taken.batch:
            self.begins.setdefault("batch", taken.batch)


class Seed:
    """Everything that is done with one seed; ``jobs`` is how many workers there are beside each other."""

    def __init__(self, recipe: Recipe, root: Path, seed: int, progress: Progress, jobs: int = 1) -> None:
        self.recipe, self.root, self.seed, self.jobs = recipe, root, seed, jobs
        root.mkdir(exist_ok=True)
        self.device = device_of(recipe.device)
        self.data: Data = resolve(recipe.data)(seed)
        self.trainer = Trainer(self.data, seed, self.device, progress)
        self.score = resolve(recipe.evaluate) if recipe.evaluate is not None else accuracy
        self._example = moved(example_of(self.data), self.device)
        shared = recipe.model_dump(mode="json", include={"data", "model", "evaluate", "train"}, exclude_none=True)
        self._shared = digest(shared)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            return numbers_of(self.score(model, self.data))

    def model(self, call: Call | None = None, **more: float) -> nn.Module:
        """The network as the seed initialises it; the recipe's, or what another function makes of ``more``."""
        seed_all(self.seed)
        built: nn.Module = resolve(call or self.recipe.model)(**more)
        return built.to(self.device)

    def cells(self) -> Iterator[Both]:
        """The dense network, then every method at every sparsity."""
        yield self.dense()
        for name in self.recipe.methods:
            yield from self.method(name)

    def dense(self) -> Both:
        """The dense network."""
        return self._cell(DENSE, 0.0, None)

    def trained(self) -> nn.Module:
        """The dense network: read, or trained and put on disk as a run does."""
        self.dense()
        return self._stored(self.root / DENSE / "0")

    def method(self, name: str) -> Iterator[Both]:
        """A method at every sparsity; the dense network is there."""
        method = self.recipe.methods[name]
        if method.iterate is not None:
            yield from self._iterated(name, method.train or self.recipe.train, method.iterate)
        else:
            for s in self.recipe.sparsities:
                yield self._cell(name, s, method)

    def check(self) -> Iterator[str]:
        """Refuses now what would be refused after hours of training; says the schedules."""
        model = self.model()
        for name, method in self.recipe.methods.items():
            how = training_of(method, self.recipe.train)
            self.trainer.optimizer(model, how)
            if method.dense is not None:
                for s in self.recipe.sparsities:
                    self.trainer.optimizer(self._smaller(method.dense, s), how)
                continue
            steps = how.epochs * self.trainer.per_epoch
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SecateurWarning)  # of a network that is not trained
                self._check_choice(model, name, method, steps)
            prune = method.prune
            if prune is not None and prune.schedule != "one-shot":
                for s in self.recipe.sparsities:
                    schedule = schedule_for(prune.schedule, s, steps, self.trainer.per_epoch)
                    yield f"{name}: {schedule!r}, over {steps} steps"

    def _check_choice(self, model: nn.Module, name: str, method: Method, steps: int) -> None:
        way, prune = way_of(method), method.prune
        assert way is not None
        choice = choice_of(way, self.seed)
        pruner = secateur.Pruner(model, **choice)
        pruner.close()
        if (
            prune is not None and prune.looks
        ):  # on one batch: a network that cannot be calibrated is told of before it is trained
            secateur.prune(self.model(), self.recipe.sparsities[0], **self._how(prune, method, batches=1))
        for s in self.recipe.sparsities:
            if prune is not None and prune.schedule == "one-shot":
                secateur.plan(model, s, **choice)
            else:
                pruner.plan(s)
        if isinstance(way, Sparse):
            self._rewire(way, steps)
        if isinstance(way, Iterate):
            asked, more, choice = self._iteration(name, method.train or self.recipe.train, way)
            Engine(model, self.root / name, Settings(**more, choice=choice)).check(asked[-1])

    def _smaller(self, how: Dense, sparsity: float) -> nn.Module:
        """The dense network that is held against pruned ones of a sparsity."""
        try:
            return self.model(how.model, density=density_of(sparsity))
        except TypeError as e:
            raise BadInput(f"{how.model.call} cannot be called with density={density_of(sparsity)}: {e}.") from e

    def _cell(self, name: str, asked: float, method: Method | None) -> Both:
        """Reads a cell that is there, or makes it and puts it on disk, whole; ``None`` makes the dense network."""
        folder = self.root / name / f"{asked:g}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            made = self._made(name, asked, method, folder)
            metrics, epochs = self.evaluate(made.model), epochs_of(method, self.recipe.train)
            cell = self._counted(made, name, asked, way_of(method), metrics, epochs, control_of(method))
            with artefact(folder, made.model) as stage:
                self._put(stage, cell, made)
        self.trainer.done(folder)
        return read_cell(folder)

    def _made(self, name: str, asked: float, method: Method | None, folder: Path) -> _Made:
        """A network, with the training that goes with it."""
        prune = None if method is None else method.prune
        made = self._begun(name, asked, method)
        if prune is not None and prune.schedule == "one-shot":
            with Meter(self.device) as meter:
                secateur.prune(made.model, asked, **self._how(prune, method))
            made.pruning, made.peak = meter.taken.seconds, meter.taken.peak
        if prune is None or prune.schedule != "one-shot" or (method is not None and method.finetune is not None):
            how = training_of(method, self.recipe.train)
            made.add(self.trainer.train(made.model, how, folder, self._holding(method, asked)))
        if method is None:
            made.begins["dense"] = digest(made.model.state_dict())
        return made

    def _how(self, prune: Prune, method: Method | None, batches: int | None = None) -> dict[str, Any]:
        """How to prune once; what needs data sees the first batches of an epoch, in the seed's order."""
        if not prune.looks:
            return choice_of(prune, self.seed)
        loss = ((method and method.train) or self.recipe.train).loss
        seen = islice(self.trainer.batches(order_of(self.seed, 0)), batches)
        return with_data(prune, seen, loss_of if loss is None else resolve(loss))

    def _begun(self, name: str, asked: float, method: Method | None) -> _Made:
        """The network that a method begins with: as it is initialised, the trained dense one, or a smaller one."""
        if method is not None and method.dense is not None:
            return _Made(self._smaller(method.dense, asked))
        prune = None if method is None else method.prune
        if prune is not None and (prune.schedule == "one-shot" or prune.start == "dense"):
            assert method is not None
            return self._dense(name, method)
        model = self.model()
        return _Made(model, {"init": digest(model.state_dict())})

    def _dense(self, name: str, method: Method) -> _Made:
        """The trained dense network a method begins with: the recipe's, or one of the method's own training."""
        folder = self.root / DENSE / "0" if method.train is None else self.root / name / DENSE
        if not folder.exists():
            own = _Made(self.model())
            own.add(self.trainer.train(own.model, method.train or self.recipe.train, folder))
            with artefact(folder, own.model) as stage:
                (stage / TAKEN).write_text(json.dumps({"training": own.training}), "utf-8")
        self.trainer.done(folder)
        model = self._stored(folder)
        spent = _read(folder / TAKEN).get("training", math.nan)
        return _Made(model, {"dense": digest(model.state_dict())}, dense=spent)

    def _stored(self, folder: Path) -> nn.Module:
        model = self.model()
        load_state(model, read_tensors(folder / WEIGHTS))
        return model

    def _holding(self, method: Method | None, sparsity: float) -> Pruned | None:
        """What holds zeros in the training of a method, and makes them where it prunes while it trains."""
        way, per_epoch = way_of(method), self.trainer.per_epoch
        if way is None:
            return None
        choice = choice_of(way, self.seed)

        def made(model: nn.Module, optimizer: Any, steps: int) -> secateur.Pruner:
            if isinstance(way, Sparse):
                rewire = self._rewire(way, steps)
                return secateur.Pruner(model, optimizer, schedules.constant(sparsity), rewire=rewire, **choice)
            if not isinstance(way, Prune) or way.schedule == "one-shot":
                return secateur.Pruner(model, optimizer, **choice)
            return secateur.Pruner(model, optimizer, schedule_for(way.schedule, sparsity, steps, per_epoch), **choice)

        return made

    def _rewire(self, how: Sparse, steps: int) -> Any:
        end = max(1, round(how.end * steps))
        if how.method == "rigl":
            return secateur.dynamic.rigl(every=how.every, end=end, drop=how.drop)
        if how.method == "set":
            return secateur.dynamic.random_growth(every=how.every, end=end, drop=how.drop, seed=self.seed)
        return None

    def _iteration(
        self, name: str, train: Training, how: Iterate
    ) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
        """What its rounds ask for, the other arguments of `secateur.iterate`, and what to prune."""
        trainer, choice = self.trainer, choice_of(how, self.seed)
        del choice["criterion"]
        more = {
            "make_optimizer": lambda m: trainer.optimizer(m, train), "make_data": trainer.batches,
            "train": partial(self._round, self.root / name, train), "evaluate": self.evaluate, "epochs": train.epochs,
            "retrain_epochs": how.epochs, "rewind": how.rewind, "controls": tuple(how.controls), "seed": self.seed,
        }  # fmt: skip
        return between(self.recipe.sparsities, how), more, choice

    def _iterated(self, name: str, train: Training, how: Iterate) -> Iterator[Both]:
        """One run through all sparsities, with rounds between them."""
        per_epoch, folder = self.trainer.per_epoch, self.root / name
        asked, more, choice = self._iteration(name, train, how)
        start = self.model()
        begins = {"init": digest(start.state_dict())}
        rounds = secateur.iterate(start, folder, sparsities=asked, **more, **choice)
        spent, dense, took = 0, 0.0, _Made(start, begins)
        first = begun(how.rewind, train.epochs, per_epoch)
        found: dict[str, list[Both]] = {}
        for r in rounds:
            spent += r.how["steps"] // per_epoch
            took.add(_taken(folder, f"round {r.number}"))
            dense = took.training if r.number == 0 else dense
            if r.asked in self.recipe.sparsities:
                found.setdefault(name, []).append(self._of_round(name, how, r, spent, replace(took)))
                for kind, c in r.controls.items():
                    made = _Made(start, {}, dense=dense * first / train.epochs)
                    made.add(_taken(folder, f"round {r.number}, {kind}"))
                    epochs = first + c.how["steps"] // per_epoch
                    found.setdefault(kind, []).append(self._of_round(f"{name}, {kind}", how, c, epochs, made))
        yield from chain.from_iterable(found.values())

    def _round(self, folder: Path, train: Training, run: Run) -> None:
        with log(folder / f"{run.what}.jsonl", run.first) as lines:
            taken = self.trainer.fit(run, train, lines, f"seed {self.seed}: {folder.name}, {run.what}")
        _write(folder / f"{run.what}.{TAKEN}", vars(taken))

    def _of_round(self, name: str, how: Iterate, r: Round, epochs: int, made: _Made) -> Both:
        """A cell of a round; its weights stay where the round has them."""
        folder = self.root / name / f"{r.asked:g}"
        if not folder.exists():
            made.model = self.model()
            r.load(made.model)
            made.whole = made.whole and r.how["made"] == r.how["steps"]
            control = "random" if r.how["control"] == "random" else ""
            cell = self._counted(made, name, r.asked, how, r.metrics, epochs, control)
            folder.parent.mkdir(exist_ok=True)
            with staged(folder, False, 0) as stage:
                stage.mkdir()
                self._put(stage, cell, made)
        return read_cell(folder)

    def _counted(
        self,
        made: _Made,
        name: str,
        asked: float,
        way: Choice | Sparse | None,
        metrics: dict[str, float],
        epochs: int,
        control: str,
    ) -> Cell:
        """A cell with the zeros that are in the model."""
        include, ignore = (None, None) if way is None else (way.include, way.ignore)
        report = secateur.inspect(made.model, include=include, ignore=ignore)
        layers = {row.name: row.sparsity or 0.0 for row in report.chosen}
        flops, effective = flops_of(made.model, self._example)
        return Cell(
            self.seed, name, asked, report.sparsity, metrics, epochs, layers, report.model_total,
            report.model_total - report.model_zeros, flops, effective, made.begins, control, made.whole, self._shared,
        )  # fmt: skip

    def _put(self, stage: Path, cell: Cell, made: _Made) -> None:
        """The facts of a cell beside its weights; what it took in a file of its own, since that is never the same twice."""
        (stage / CELL).write_text(json.dumps(vars(cell)), "utf-8")
        took = {"dense": made.dense, "pruning": made.pruning, "training": made.training}
        if math.isfinite(sum(took.values())):
            (stage / TAKEN).write_text(json.dumps({**took, "peak": made.peak, "jobs": self.jobs}), "utf-8")


def _taken(folder: Path, what: str) -> Taken:
    """What a round took; unknown where an older version ran it."""
    found = _read(folder / f"{what}.{TAKEN}")
    return Taken(**found) if found else Taken(math.nan)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(dict(facts))
    with staged(path, True, len(text)) as stage:
        stage.write_text(text, "utf-8")
