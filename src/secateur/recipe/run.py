"""Runs a recipe: every cell, a seed, a method and a sparsity, is an artefact on disk, so that a run can be taken up."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from secateur.core import schedules
from secateur.errors import SecateurWarning
from secateur.report.run_facts import Cell
from secateur.stores.staging import staged
from secateur.train.engine import Engine, Run, Settings, numbers_of
from secateur.train.randomness import seed_all
from secateur.train.rounds import WEIGHTS, Round, artefact, load_state, locked, read_rounds, read_tensors

from .page import page
from .schema import Choice, Iterate, Method, Recipe, Schedule, Sparse, Training
from .training import Data, Progress, Pruned, Trainer, accuracy, device_of, log, resolve


def quiet(what: str, done: int = 0, total: int = 0) -> None:
    """Progress for nobody."""


def run(recipe: Recipe, progress: Progress = quiet, say: Callable[[str], None] = quiet) -> list[Cell]:
    """Runs what is not there yet, and returns every cell; the folder then holds ``results.json`` and ``report.html``.

    Args:
        recipe: what to run.
        progress: told after every step what is trained and how far it is, and after every cell how many there are.
        say: told the schedules before the first training begins.

    Raises:
        BadInput: the folder is in use, or holds another recipe; a function of the recipe cannot be found.
        BadTensor: a loss or a weight became NaN or infinite; what was finished before is kept.
    """
    started = time.perf_counter()
    with held(recipe) as root:
        cells: list[Cell] = []
        controls = sum(len(m.iterate.controls) for m in recipe.methods.values() if m.iterate is not None)
        each = 1 + (len(recipe.methods) + controls) * len(recipe.sparsities)
        for seed in recipe.seeds:
            one = Seed(recipe, root / f"seed-{seed}", seed, progress)
            for line in one.check():
                if seed == recipe.seeds[0]:
                    say(line)
            for cell in one.cells():
                cells.append(cell)
                progress("all", len(cells), each * len(recipe.seeds))
        _write(root / "results.json", to_json(cells))
        _write(root / "report.html", page(recipe, root, cells, time.perf_counter() - started))
        _export(recipe, root)
    return cells


@contextmanager
def held(recipe: Recipe) -> Iterator[Path]:
    """Holds the folder of a recipe's run, which is made if it is not there, and torch at the recipe's threads.

    Raises:
        BadInput: the folder is in use, or holds another recipe; a function of the recipe cannot be found.
    """
    _check_calls(recipe)
    root = Path(recipe.folder)
    with locked(root, recipe.model_dump(mode="json")), _threads(recipe.threads):
        yield root


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(path: Path, text: str) -> None:
    with staged(path, True, len(text.encode())) as stage:
        stage.write_text(text, "utf-8")


def to_json(cells: Iterable[Cell]) -> str:
    """Every cell."""
    return json.dumps([vars(c) for c in cells], indent=1)


def _check_calls(recipe: Recipe) -> None:
    trainings = [recipe.train, *(m.train for m in recipe.methods.values() if m.train is not None)]
    calls = [recipe.data, recipe.model, recipe.evaluate]
    for call in (*calls, *(c for t in trainings for c in (t.optimizer, t.loss, t.loop))):
        if call is not None:
            resolve(call)


class Seed:
    """Everything that is done with one seed."""

    def __init__(self, recipe: Recipe, root: Path, seed: int, progress: Progress) -> None:
        self.recipe, self.root, self.seed = recipe, root, seed
        root.mkdir(exist_ok=True)
        self.device = device_of(recipe.device)
        self.data: Data = resolve(recipe.data)(seed)
        self.trainer = Trainer(self.data, seed, self.device, progress)
        self.score = resolve(recipe.evaluate) if recipe.evaluate is not None else accuracy

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            return numbers_of(self.score(model, self.data))

    def model(self) -> nn.Module:
        """The network as the seed initialises it."""
        seed_all(self.seed)
        built: nn.Module = resolve(self.recipe.model)()
        return built.to(self.device)

    def cells(self) -> Iterator[Cell]:
        """The dense network, then every method at every sparsity."""
        yield self._cell("dense", 0.0, None)
        for name, method in self.recipe.methods.items():
            if method.iterate is not None:
                yield from self._iterated(name, method.train or self.recipe.train, method.iterate)
            else:
                for s in self.recipe.sparsities:
                    yield self._cell(name, s, method)

    def check(self) -> Iterator[str]:
        """Refuses now what would be refused after hours of training; says the schedules."""
        model = self.model()
        for name, method in self.recipe.methods.items():
            how = self._training(method)
            self.trainer.optimizer(model, how)
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
        sparse, prune = method.sparse, method.prune
        choice = _choice(_way(method)) if sparse is None else _sparse_choice(sparse, self.seed)
        pruner = secateur.Pruner(model, **choice)
        pruner.close()
        for s in self.recipe.sparsities:
            if prune is not None and prune.schedule == "one-shot":
                secateur.plan(model, s, **choice)
            else:
                pruner.plan(s)
        if sparse is not None:
            self._rewire(sparse, steps)
        if method.iterate is not None:
            asked, more, choice = self._iteration(name, method.train or self.recipe.train, method.iterate)
            Engine(model, self.root / name, Settings(**more, choice=choice)).check(asked[-1])

    def _training(self, method: Method) -> Training:
        """The training that prunes: the whole of it, or after the dense one the fine-tuning."""
        how = method.train or self.recipe.train
        again = method.finetune
        if method.prune is None or again is None:
            return how
        if method.prune.schedule == "one-shot" or method.prune.start == "dense":
            return how.model_copy(update=again.model_dump())
        return how.model_copy(update={"epochs": how.epochs + again.epochs})

    def _epochs(self, method: Method | None) -> int:
        if method is None:
            return self.recipe.train.epochs
        again = 0 if method.finetune is None else method.finetune.epochs
        return (method.train or self.recipe.train).epochs + again

    def _cell(self, name: str, asked: float, method: Method | None) -> Cell:
        """Reads a cell that is there, or makes it and puts it on disk, whole; ``None`` makes the dense network."""
        folder = self.root / name / f"{asked:g}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            if method is None:
                model = self.model()
                self.trainer.train(model, self.recipe.train, folder)
                way = None
            else:
                model, way = self._pruned(name, method, asked, folder), _way(method)
            cell = self._counted(model, name, asked, way, self.evaluate(model), self._epochs(method))
            with artefact(folder, model) as stage:
                (stage / "cell.json").write_text(json.dumps(vars(cell)), "utf-8")
        self.trainer.done(folder)
        return Cell(**json.loads((folder / "cell.json").read_text("utf-8")))

    def _dense(self, name: str, method: Method) -> nn.Module:
        """The trained dense network a method begins with: the recipe's, or one of the method's own training."""
        folder = self.root / "dense" / "0" if method.train is None else self.root / name / "dense"
        if not folder.exists():
            model = self.model()
            self.trainer.train(model, method.train or self.recipe.train, folder)
            with artefact(folder, model):
                pass
        self.trainer.done(folder)
        return self._read(folder)

    def trained(self) -> nn.Module:
        """The recipe's dense network: read, or trained and put on disk as a run does."""
        self._cell("dense", 0.0, None)
        return self._read(self.root / "dense" / "0")

    def _read(self, folder: Path) -> nn.Module:
        model = self.model()
        load_state(model, read_tensors(folder / WEIGHTS))
        return model

    def _pruned(self, name: str, method: Method, sparsity: float, folder: Path) -> nn.Module:
        """A pruned network, with the training that goes with it."""
        how = self._training(method)
        if method.sparse is not None:
            model = self.model()
            self.trainer.train(model, how, folder, self._sparse(method.sparse, sparsity))
            return model
        assert method.prune is not None
        choice, schedule = _choice(method.prune), method.prune.schedule
        if schedule != "one-shot":
            model = self.model() if method.prune.start == "init" else self._dense(name, method)
            self.trainer.train(model, how, folder, self._gradual(schedule, sparsity, choice))
            return model
        model = self._dense(name, method)
        secateur.prune(model, sparsity, **choice)
        if method.finetune is not None:
            self.trainer.train(model, how, folder, lambda m, o, steps: secateur.Pruner(m, o, **choice))
        return model

    def _gradual(self, asked: Any, sparsity: float, choice: dict[str, Any]) -> Pruned:
        per_epoch = self.trainer.per_epoch
        return lambda model, optimizer, steps: secateur.Pruner(
            model, optimizer, schedule_for(asked, sparsity, steps, per_epoch), **choice
        )

    def _sparse(self, how: Sparse, sparsity: float) -> Pruned:
        def made(model: nn.Module, optimizer: Any, steps: int) -> secateur.Pruner:
            rewire, choice = self._rewire(how, steps), _sparse_choice(how, self.seed)
            return secateur.Pruner(model, optimizer, schedules.constant(sparsity), rewire=rewire, **choice)

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
        trainer, choice = self.trainer, _choice(how)
        del choice["criterion"]
        more = {
            "make_optimizer": lambda m: trainer.optimizer(m, train), "make_data": trainer.batches,
            "train": partial(self._round, self.root / name, train), "evaluate": self.evaluate, "epochs": train.epochs,
            "retrain_epochs": how.epochs, "rewind": how.rewind, "controls": tuple(how.controls), "seed": self.seed,
        }  # fmt: skip
        return _between(self.recipe.sparsities, how), more, choice

    def _iterated(self, name: str, train: Training, how: Iterate) -> Iterator[Cell]:
        """One run through all sparsities, with rounds between them."""
        trainer = self.trainer
        asked, more, choice = self._iteration(name, train, how)
        rounds = secateur.iterate(self.model(), self.root / name, sparsities=asked, **more, **choice)
        spent = 0
        found: dict[str, list[Cell]] = {}
        for r in rounds:
            spent += r.how["steps"] // trainer.per_epoch
            if r.asked in self.recipe.sparsities:
                found.setdefault(name, []).append(self._of_round(name, how, r, spent))
                for kind, c in r.controls.items():
                    epochs = _begun(how.rewind, train.epochs, trainer.per_epoch) + c.how["steps"] // trainer.per_epoch
                    found.setdefault(kind, []).append(self._of_round(f"{name}, {kind}", how, c, epochs))
        yield from chain.from_iterable(found.values())

    def _round(self, folder: Path, train: Training, run: Run) -> None:
        with log(folder / f"{run.what}.jsonl", run.first) as lines:
            self.trainer.fit(run, train, lines, f"seed {self.seed}: {folder.name}, {run.what}")

    def _of_round(self, name: str, how: Iterate, r: Round, epochs: int) -> Cell:
        model = self.model()
        r.load(model)
        return self._counted(model, name, r.asked, how, r.metrics, epochs)

    def _counted(
        self,
        model: nn.Module,
        name: str,
        asked: float,
        way: Choice | Sparse | None,
        metrics: dict[str, float],
        epochs: int,
    ) -> Cell:
        """A cell with the zeros that are in the model."""
        include, ignore = (None, None) if way is None else (way.include, way.ignore)
        report = secateur.inspect(model, include=include, ignore=ignore)
        layers = {row.name: row.sparsity or 0.0 for row in report.chosen}
        return Cell(self.seed, name, asked, report.sparsity, metrics, epochs, layers)


def _way(method: Method) -> Choice | Sparse:
    found = method.prune or method.iterate or method.sparse
    assert found is not None
    return found


def _choice(how: Any) -> dict[str, Any]:
    fields: dict[str, Any] = how.model_dump(include=set(Choice.model_fields))
    return fields


def _sparse_choice(how: Sparse, seed: int) -> dict[str, Any]:
    random = secateur.random(seed)
    return {**how.model_dump(include={"allocation", "include", "ignore"}), "criterion": random}


def schedule_for(asked: Any, target: float, steps: int, per_epoch: int) -> schedules.Schedule:
    """The schedule of a training of so many steps."""
    if not isinstance(asked, Schedule):
        return schedules.auto(target, steps)
    unit = per_epoch if asked.unit == "epochs" else 1
    begin, end, every = round(asked.begin * unit), round(asked.end * unit), max(1, round(asked.every * unit))
    if end > steps:
        raise secateur.BadInput(
            f"the schedule ends at step {end}, and the training has {steps} steps: the target would not be reached. "
            f"End it at {steps / unit:g} {asked.unit} or before, or train longer."
        )
    more: dict[str, Any] = {"power": asked.power} if asked.kind == "polynomial" else {}
    make = getattr(schedules, asked.kind)
    made: schedules.Schedule = make(target, begin=begin, end=end, every=every, initial=asked.initial, **more)
    return made


def _begun(rewind: int | str, epochs: int, per_epoch: int) -> int:
    """Epochs of the dense round that a control's weights have behind them."""
    return rewind // per_epoch if isinstance(rewind, int) else 0 if rewind == "init" else epochs


def _between(sparsities: list[float], how: Iterate) -> list[float]:
    """The sparsity of every round, on the original size."""
    out, before = [], 0.0
    for s in sparsities:
        needed = math.ceil(math.log((1 - s) / (1 - before)) / math.log(1 - how.rate) - 1e-9)
        rounds = needed if how.rounds is None else how.rounds
        out += [1 - (1 - before) ** (1 - r / rounds) * (1 - s) ** (r / rounds) for r in range(1, rounds)]
        out.append(s)
        before = s
    return out


def _export(recipe: Recipe, root: Path) -> None:
    """Puts one network where others can take it from."""
    out, chosen = root / "export", recipe.export
    if chosen is None or out.exists():
        return
    seed = recipe.seeds[0] if chosen.seed is None else chosen.seed
    folder = root / f"seed-{seed}" / chosen.method
    if recipe.methods[chosen.method].iterate is not None:
        rounds = read_rounds(folder)
        source = next(r.folder for r in rounds if r.asked == chosen.sparsity)
    else:
        source = folder / f"{chosen.sparsity:g}"
    model: Any = resolve(recipe.model)()
    load_state(model, read_tensors(source / WEIGHTS))
    if not hasattr(model, "save_pretrained"):
        with artefact(out, model):
            return
    with staged(out, False, sum(t.numel() * t.element_size() for t in model.state_dict().values())) as stage:
        model.save_pretrained(stage)
