"""What one iterative run does in a round: prune, rewind, train, and put the round on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from secateur.core.schedules import check_count
from secateur.errors import BadInput, BadTensor

from .controls import Control, check_redraws, pruned_masks, random_masks, redraw
from .optimizers import skipped
from .pruner import Pruner
from .randomness import check_seed, get_random, seed_all, set_random
from .rounds import Round, load_state, read_snapshot, write_round, write_snapshot

Named = Literal["init", "lr", "linear", "finetune"]
Rewind = int | Named
Asked = float | dict[str, float]
CHOICE = {"allocation", "pattern", "include", "ignore", "max_sparsity", "min_keep", "roles"}
WARM_UP = 0.1
"""Share of the steps over which ``rewind="linear"`` raises the learning rate from zero."""


@dataclass
class Run:
    """A stretch of training, as a user's ``train`` gets it.

    Attributes:
        model, optimizer, scheduler: what is trained; ``scheduler`` may be ``None``, else it makes one step an update.
        pruner: counts the optimizer's steps and holds the zeros; ``None`` in the dense round.
        first, last: the updates to make, from ``first`` up to and without ``last``.
        epoch: ``epoch(e)`` gives the batches of epoch e, in the order that the seed and e alone decide.
        steps_per_epoch: updates an epoch.
        what: the round this is, such as ``"round 3"`` or ``"round 3, reinit"``.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    pruner: Pruner | None
    first: int
    last: int
    epoch: Callable[[int], Iterable[Any]]
    steps_per_epoch: int
    what: str = ""

    def batches(self) -> Iterable[tuple[int, Any]]:
        """(step, batch) of every update to make, also from the middle of an epoch."""
        step = self.first
        while step < self.last:
            number, skip = divmod(step, self.steps_per_epoch)
            end = min(self.last, (number + 1) * self.steps_per_epoch)
            for i, batch in enumerate(self.epoch(number)):
                if step == end:
                    break
                if i >= skip:
                    yield step, batch
                    step += 1
            if step != end:
                raise BadInput(f"epoch {number} gave fewer than {self.steps_per_epoch} batches.")


@dataclass
class Settings:
    """What `secateur.iterate` was asked, checked."""

    make_optimizer: Callable[[nn.Module], tuple[Optimizer, Any]]
    make_data: Callable[[torch.Generator], Iterable[Any]]
    train: Callable[[Run], None]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    epochs: int
    retrain_epochs: int
    rewind: Rewind
    controls: tuple[Control, ...]
    seed: int
    choice: dict[str, Any]


def share_of(asked: Asked) -> float:
    """The sparsity of the layers that have none of their own."""
    return asked if isinstance(asked, float) else asked["*"]


def choice_for(asked: Asked, choice: dict[str, Any]) -> dict[str, Any]:
    """The choice of a round: sparsities of layers are its allocation."""
    return (
        choice if isinstance(asked, float) else {**choice, "allocation": {g: s for g, s in asked.items() if g != "*"}}
    )


def order_of(seed: int, epoch: int) -> torch.Generator:
    """What draws the order of an epoch: seed and epoch alone, so that any epoch can be run again."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def update(loss: Tensor, model: nn.Module, optimizer: Optimizer, scheduler: Any, where: str) -> float:
    """One update of a model from a loss, which it returns.

    Raises:
        BadTensor: the loss is NaN or infinite; ``where`` says when, and a weight that is so too is named.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        told = _broken(model) or "all weights are finite"
        raise BadTensor(f"the loss is {value} at {where} ({told}); what was finished before is kept.")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return value


def length_of(epoch: Any, what: str) -> int:
    """How many batches an epoch has.

    Raises:
        BadInput: none, or nobody knows: a generator, or a DataLoader over an iterable without a length.
    """
    try:
        found = len(epoch)
    except TypeError:
        raise BadInput(
            f"{what} gave a {type(epoch).__name__}, which has no length: give a list of batches, or a DataLoader over a data "
            "set with one, since steps are counted from it."
        ) from None
    if not found:
        raise BadInput(f"{what} gave an epoch without batches.")
    return found


def _check_settings(settings: Settings) -> None:
    for name in ("epochs", "retrain_epochs"):
        check_count(getattr(settings, name), name)
    check_seed(settings.seed)
    rewind = settings.rewind
    if isinstance(rewind, bool) or not (isinstance(rewind, int) or rewind in get_args(Named)):
        raise BadInput(f"rewind is a step, an int, or one of {', '.join(map(repr, get_args(Named)))}; got {rewind!r}.")
    if odd := sorted({*settings.choice} - CHOICE):
        raise BadInput(f"iterate takes {', '.join(sorted(CHOICE))} beside its own arguments; got {', '.join(odd)}.")


class Engine:
    """The rounds of one run over one model."""

    def __init__(self, model: nn.Module, root: Path, settings: Settings) -> None:
        self.model, self.root, self.settings = model, root, settings
        _check_settings(settings)
        self.per_epoch = length_of(self._epoch(0), "make_data")
        self.steps = settings.epochs * self.per_epoch
        again = settings.retrain_epochs * self.per_epoch
        rewind = settings.rewind
        self.first = 0 if rewind == "init" else rewind if isinstance(rewind, int) else max(0, self.steps - again)
        self.last = self.steps if isinstance(rewind, int) or rewind in ("init", "lr") else self.first + again
        if not 0 <= self.first < self.last:
            raise BadInput(f"rewind={rewind!r} leaves no steps to train: the dense round makes {self.steps}.")

    def check(self, asked: Asked) -> None:
        """Plans what the last round asks for; touches nothing."""
        pruner = Pruner(self.model, **choice_for(asked, self.settings.choice))
        pruner.close()
        pruner.plan(share_of(asked))
        if "reinit" in self.settings.controls:
            check_redraws(self.model)
        if self.settings.rewind == "finetune" and not any(self._last_rates()):
            raise BadInput(
                "rewind='finetune' keeps the last learning rate of the dense round, and this schedule ends at 0: nothing "
                "would be learned. Use rewind='lr' or 'linear', or a schedule that ends above 0."
            )

    def _last_rates(self) -> list[float]:
        """The learning rates at the end of the dense round, by its scheduler alone."""
        optimizer, scheduler = self.settings.make_optimizer(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no update is made between two of its steps
            for _ in range(0 if scheduler is None else self.steps):
                scheduler.step()
        return [float(g["lr"]) for g in optimizer.param_groups]

    def _epoch(self, number: int) -> Iterable[Any]:
        return self.settings.make_data(order_of(self.settings.seed, number))

    def _snapshot(self, step: int) -> Path:
        return self.root / f"snapshot-{step:08d}.pt"

    def dense(self) -> Round:
        """Trains the dense network, keeping what later rounds are rewound to."""
        start = read_snapshot(self._snapshot(0)) if self._snapshot(0).exists() else None
        if start is not None:  # a run that was killed here begins with the same weights
            load_state(self.model, start["model"])
        optimizer, scheduler = self.settings.make_optimizer(self.model)
        if start is not None:  # after make_optimizer, which may draw: the snapshot was made after it too
            set_random(start["random"])
        stops = sorted({0, self.first, self.steps})
        made = 0
        for a, b in zip(stops, [*stops[1:], None], strict=True):
            if not (a == 0 and self._snapshot(0).exists()):
                self._keep(a, optimizer, scheduler)
            if b is not None:
                made += self._train("round 0", optimizer, scheduler, None, a, b)
        return self._finish(0, 0.0, {}, {"steps": self.steps, "made": made})

    def _keep(self, step: int, optimizer: Optimizer, scheduler: Any) -> None:
        state = {
            "model": self.model.state_dict(), "optimizer": optimizer.state_dict(), "random": get_random(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }  # fmt: skip
        write_snapshot(self._snapshot(step), state)

    def _train(
        self, what: str, optimizer: Optimizer, scheduler: Any, pruner: Pruner | None, first: int, last: int
    ) -> int:
        """Trains, and returns how many updates were made: what a user's loop does is counted, not believed."""
        made = 0

        def count(stepped: Optimizer, *_: Any) -> None:
            nonlocal made
            made += not skipped(stepped)

        handle = optimizer.register_step_post_hook(count)
        try:
            self.settings.train(
                Run(self.model, optimizer, scheduler, pruner, first, last, self._epoch, self.per_epoch, what)
            )
        finally:
            handle.remove()
        if made > last - first:
            raise BadInput(
                f"{what}: train made {made} updates, and was asked for {last - first}: from {first} up to {last}."
            )
        return made

    def round(self, number: int, asked: Asked, before: Round) -> Round:
        """Prunes what the round before left, rewinds, trains."""
        before.load(self.model)
        masks = pruned_masks(self.model, share_of(asked), choice_for(asked, self.settings.choice))
        if self._rewinds_weights:
            self._load_start()
        return self._held(number, None, asked, masks)

    def control(self, kind: Control, ticket: Round, asked: Asked, dense: Round) -> Round:
        """Trains what a ticket is held against as the ticket was trained; from the dense round's weights if those stay."""
        if self._rewinds_weights:
            self._load_start()
        else:
            dense.load(self.model)
        if kind == "reinit":
            masks = ticket.masks()
            redraw(self.model, self.settings.seed, ticket.number)
        else:
            masks = random_masks(self.model, ticket.masks(), share_of(asked), self.settings.choice, self.settings.seed)
        return self._held(ticket.number, kind, asked, masks)

    @property
    def _rewinds_weights(self) -> bool:
        return isinstance(self.settings.rewind, int) or self.settings.rewind == "init"

    def _load_start(self) -> None:
        load_state(self.model, read_snapshot(self._snapshot(self.first))["model"])

    def _held(self, number: int, kind: Control | None, asked: Asked, masks: Mapping[str, Tensor]) -> Round:
        """Trains under masks, and puts the round on disk."""
        optimizer, scheduler = self._rewind_optimizer()
        pruner = Pruner(self.model, optimizer, **self.settings.choice)
        try:
            pruner.hold(masks)
            self._rewind_random(number)
            what = f"round {number}" if kind is None else f"round {number}, {kind}"
            made = self._train(what, optimizer, scheduler, pruner, self.first, self.last)
        finally:
            pruner.close()
        how = {"rewind": self.settings.rewind, "control": kind, "steps": self.last - self.first, "made": made}
        return self._finish(number, share_of(asked), masks, how, pruner.sparsity)

    def _rewind_optimizer(self) -> tuple[Optimizer, Any]:
        rewind = self.settings.rewind
        optimizer, scheduler = self.settings.make_optimizer(self.model)
        if rewind == "linear":
            return optimizer, LambdaLR(optimizer, partial(_up_and_down, steps=self.last - self.first))
        then = read_snapshot(self._snapshot(self.steps if rewind == "finetune" else self.first))
        if rewind in ("lr", "finetune"):
            then["optimizer"]["state"] = {}  # the rate and the rest of the settings of that step; no momentum
        optimizer.load_state_dict(then["optimizer"])
        if rewind == "finetune":
            return optimizer, None
        if scheduler is not None:
            scheduler.load_state_dict(then["scheduler"])
        return optimizer, scheduler

    def _rewind_random(self, number: int) -> None:
        if self._rewinds_weights:
            set_random(read_snapshot(self._snapshot(self.first))["random"])
        else:
            seed_all(self.settings.seed * 2003 + number)

    def _finish(
        self, number: int, asked: float, masks: Mapping[str, Tensor], how: dict[str, Any], sparsity: float = 0.0
    ) -> Round:
        if not how["made"]:
            raise BadInput(f"round {number}: train made no update with the optimizer of its run, run.optimizer.")
        check_finite(self.model, f"after the last update of round {number}")
        made = Round(self.root, number, asked, sparsity, self._metrics(), how)
        return write_round(self.root, made, self.model, masks)

    def _metrics(self) -> dict[str, float]:
        if self.settings.evaluate is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            return numbers_of(self.settings.evaluate(self.model))

    def try_evaluate(self) -> None:
        """Calls ``evaluate`` once on the model as it comes: what is wrong with it shows now, not after a round of training."""
        mode, before = self.model.training, get_random()
        try:
            self._metrics()
        finally:
            self.model.train(mode)
            set_random(before)


def _up_and_down(step: int, steps: int) -> float:
    up = max(1, round(WARM_UP * steps))
    return (step + 1) / up if step < up else max(0.0, (steps - step) / max(1, steps - up))


def check_finite(model: nn.Module, when: str) -> None:
    """Refuses weights that the last update broke, which no later loss has shown.

    Raises:
        BadTensor: a parameter holds NaN or infinite values.
    """
    if told := _broken(model):
        raise BadTensor(f"{told} {when}; what was finished before is kept.")


def _broken(model: nn.Module) -> str:
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return f"{name} (shape {tuple(p.shape)}) holds NaN or infinite values"
    return ""


def numbers_of(metrics: Any) -> dict[str, float]:
    """What ``evaluate`` returned, as Python's numbers.

    Raises:
        BadInput: not a mapping of names to single numbers.
    """
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise BadInput(f"evaluate returns a mapping of names to numbers; got {metrics!r}.") from None
