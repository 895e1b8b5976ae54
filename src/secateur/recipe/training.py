"""How a recipe trains: its optimizer, learning rate, loss or loop; a line a step in a log; taken up where it was killed."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from secateur.errors import BadInput
from secateur.train import regularize
from secateur.train.engine import Run, check_finite, length_of, order_of, update
from secateur.train.pruner import Pruner
from secateur.train.randomness import get_random, seed_all, set_random
from secateur.train.rounds import load_state, read_snapshot, write_snapshot

from .measure import Meter, Taken
from .schema import Call, Regularize, Training

Progress = Callable[[str, int, int], None]
"""``(what, done, total)``, called after every step."""
Pruned = Callable[[nn.Module, Optimizer, int], Pruner]
"""``(model, optimizer, steps) -> Pruner``: what holds zeros during a training of so many steps."""


class Data(Protocol):
    """What a recipe's ``data`` function returns for a seed.

    A batch is (inputs, labels), or a mapping of keyword arguments to a model that returns its loss and its logits.
    ``test`` is one pair of inputs and labels, or an iterable of batches. Data may also have a part of the same form to choose by,
    ``validation``.
    """

    test: Any

    def train(self, generator: torch.Generator) -> Iterable[Any]:
        """The batches of one epoch, with a length, in an order drawn from the generator."""
        ...


def resolve(call: Call) -> Callable[..., Any]:
    """The function a recipe names, with its arguments.

    Raises:
        BadInput: there is no such module or function.
    """
    module, _, name = call.call.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise BadInput(
            f"{call.call!r} cannot be found: {e}. It is looked for in the folder you run in, and where Python looks."
        ) from None
    return lambda *a, **more: function(*a, **more, **call.args)


def device_of(asked: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        BadInput: a GPU that is not there.
    """
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise BadInput("device: cuda was asked for, and torch sees no GPU here; say auto or cpu.")
    return torch.device("cuda" if there and asked != "cpu" else "cpu")


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    return tuple(moved(b, device) for b in batch) if isinstance(batch, list | tuple) else batch


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss of a mapping, the cross-entropy of (inputs, labels)."""
    if isinstance(batch, Mapping):
        own: Tensor = model(**batch).loss
        return own
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, data: Data) -> dict[str, float]:
    """Share of the test part that is classified right, in percent; what ``evaluate`` is by default."""
    device = next(model.parameters()).device
    right = total = 0
    for batch in _batches(data.test):
        batch = moved(batch, device)
        if isinstance(batch, Mapping):
            labels = batch["labels"]
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        else:
            labels, logits = batch[1], model(batch[0])
        right += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return {"accuracy": 100 * right / total}


def _batches(test: Any) -> Iterable[Any]:
    if isinstance(test, tuple) and len(test) == 2 and isinstance(test[0], Tensor):
        return zip(test[0].split(500), test[1].split(500), strict=True)
    batches: Iterable[Any] = test
    return batches


class Trainer:
    """Trains on the data of one seed."""

    def __init__(self, data: Data, seed: int, device: torch.device, progress: Progress) -> None:
        self.data, self.seed, self.device, self.progress = data, seed, device, progress
        self.per_epoch = length_of(data.train(torch.Generator()), "data.train")
        self.meter = Meter(device)

    def batches(self, generator: torch.Generator) -> Any:
        """One epoch, on the device, with a length."""
        return _Moved(self.data.train(generator), self.device, self.meter)

    def optimizer(self, model: nn.Module, how: Training) -> tuple[Optimizer, LambdaLR]:
        """The optimizer and the learning rate of a training."""
        call = how.optimizer
        try:
            optimizer: Optimizer = resolve(call)(model.parameters())
        except (TypeError, ValueError) as e:
            raise BadInput(f"{call.call} cannot be called with the parameters and {call.args}: {e}.") from e
        steps = self.per_epoch * how.epochs
        return optimizer, LambdaLR(optimizer, partial(_rate, how.learning_rate, how.warm_up, steps))

    def train(self, model: nn.Module, how: Training, folder: Path, pruned: Pruned | None = None) -> Taken:
        """A whole training; its log is beside ``folder``, and so is what it can be taken up from, until `done`.

        Returns:
            What it took, with what it had taken before it was taken up.

        Raises:
            BadTensor: the loss is NaN or infinite, or an update broke a weight; what it can be taken up from is not.
        """
        steps = how.epochs * self.per_epoch
        optimizer, rate = self.optimizer(model, how)
        pruner = None if pruned is None else pruned(model, optimizer, steps)
        parts: list[Any] = [model, optimizer, rate, *([] if pruner is None else [pruner])]
        kept = _snapshot(folder)
        seed_all(self.seed)  # whatever was trained before in this process: a run that was killed has not trained it
        (first, before), what = _take_up(kept, parts), f"seed {self.seed}: {folder.parent.name}, {folder.name}"

        def epoch(number: int) -> Any:
            if number * self.per_epoch > first:
                check_finite(model, f"after epoch {number} of {what}")
                lines.flush()
                state = {"step": number * self.per_epoch, "random": get_random(), "taken": vars(self.meter.taken)}
                write_snapshot(kept, state | {str(i): p.state_dict() for i, p in enumerate(parts)})
            return self.batches(order_of(self.seed, number))

        run = Run(model, optimizer, rate, pruner, first, steps, epoch, self.per_epoch)
        try:
            with log(folder.with_name(f"{folder.name}.jsonl"), first) as lines:
                taken = self.fit(run, how, lines, what, before)
            check_finite(model, f"after the last update of {what}")
        finally:
            if pruner is not None:
                pruner.close()
        return taken

    def done(self, folder: Path) -> None:
        """To be called when the result of a training is on disk: nothing will be taken up any more."""
        _snapshot(folder).unlink(missing_ok=True)

    def fit(self, run: Run, how: Training, lines: Any, what: str, before: Taken | None = None) -> Taken:
        """Makes the updates of a run by the recipe's loop, or by the usual one; writes a line a step."""
        watch, self.meter = _Watch(run, lines, what, self.progress), Meter(self.device, before)
        loss = watch.seen(loss_of if how.loss is None else resolve(how.loss))
        with self.meter, watch, _regularized(run, how.regularize):
            if how.loop is not None:
                resolve(how.loop)(run)
            else:
                run.model.train()
                for step, batch in run.batches():
                    update(loss(run.model, batch), run.model, run.optimizer, run.scheduler, f"{what}, step {step}")
        return replace(self.meter.taken, whole=watch.step >= run.last)


class _Moved:
    """Batches that come to the device one by one; the first that is trained on is noted."""

    def __init__(self, batches: Any, device: torch.device, meter: Meter) -> None:
        self._batches, self._device, self._meter = batches, device, meter

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._meter.note(batch)
            yield moved(batch, self._device)


class _Watch:
    """Writes a line after every step of the optimizer: step, loss, sparsity asked and found."""

    def __init__(self, run: Run, lines: Any, what: str, progress: Progress) -> None:
        self._run, self._lines, self._what, self._progress = run, lines, what, progress
        self.step = run.first
        self._loss: Tensor | None = None
        self._asked: float | None = -1.0
        self._found = 0.0

    def seen(self, loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        """The same loss, whose last value goes into the line."""

        def watched(model: nn.Module, batch: Any) -> Tensor:
            value = loss(model, batch)
            self._loss = value.detach()
            return value

        return watched

    def __enter__(self) -> None:
        self._handle = self._run.optimizer.register_step_post_hook(lambda *_: self._line())

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _line(self) -> None:
        self.step += 1
        pruner = self._run.pruner
        if pruner is not None and pruner.asked != self._asked:  # counting the masks takes a while where they are large
            self._asked, self._found = pruner.asked, pruner.sparsity
        facts = {"step": self.step, "loss": None if self._loss is None else float(self._loss)}
        facts |= {"asked": self._found if pruner is None or self._asked is None else self._asked, "found": self._found}
        self._lines.write(json.dumps(facts) + "\n")
        self._progress(self._what, self.step, self._run.last)


def _regularized(run: Run, how: Regularize | None) -> AbstractContextManager[Any]:
    if how is None:
        return nullcontext()
    made: Any = getattr(regularize, how.kind)(how.strength)
    return closing(regularize.attach(run.model, run.optimizer, made, include=how.include, ignore=how.ignore))


def _snapshot(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.snapshot.pt")


def _take_up(kept: Path, parts: list[Any]) -> tuple[int, Taken | None]:
    """The step to go on from, that of a snapshot if a training was killed here, else 0; and what was taken to get there."""
    if not kept.exists():
        return 0, None
    state = read_snapshot(kept)
    load_state(parts[0], state["0"])
    for i, part in enumerate(parts[1:], 1):
        part.load_state_dict(state[str(i)])
    set_random(state["random"])
    return int(state["step"]), Taken(**state["taken"]) if "taken" in state else None


@contextmanager
def log(path: Path, first: int) -> Iterator[Any]:
    """A log that holds the lines up to step ``first``, and gets more.

    It is cut where it lies: lines that were written anew would be lost to a run that is killed before they reach the file.
    """
    with path.open("a+b") as old:
        old.seek(0)
        size = 0
        for line in old:
            if not line.endswith(b"}\n") or json.loads(line)["step"] > first:
                break
            size += len(line)
        old.truncate(size)
    with path.open("a", encoding="utf-8") as out:
        yield out


def _rate(kind: str, warm_up: float, steps: int, step: int) -> float:
    """The share of the learning rate at a step."""
    up = round(warm_up * steps)
    if step < up:
        return (step + 1) / up
    if kind == "constant":
        return 1.0
    left = max(0.0, 1 - (step - up) / max(1, steps - up))
    return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))
