"""Iterative magnitude pruning: train, prune a share of what is left, rewind, train again; lottery tickets and controls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.allocate import check_sparsity
from secateur.errors import BadInput

from .controls import CONTROLS, Control
from .engine import Asked, Engine, Rewind, Run, Settings, update
from .rounds import Round, locked, read_rounds


def iterate(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    make_optimizer: Callable[[nn.Module], tuple[Optimizer, Any]],
    make_data: Callable[[torch.Generator], Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    train: Callable[[Run], None] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    epochs: int = 5,
    retrain_epochs: int | None = None,
    rounds: int = 10,
    rate: float | Mapping[str, float] = 0.2,
    target: float | None = None,
    sparsities: Sequence[float] | None = None,
    rewind: Rewind = "init",
    controls: Sequence[Control] = (),
    seed: int = 0,
    **choice: Any,
) -> list[Round]:
    """Iterative magnitude pruning with rewinding (Frankle and Carbin, arXiv:1803.03635; Renda et al., arXiv:2003.02389).

    A dense round, then in every further one: prune a share of what is left, counted on the original size so that rounding
    does not add up; rewind; train. Every round is an artefact in ``folder``; a run that was killed goes on in the round it
    was in, with the same result.

    Args:
        model: trained in place from its present weights; left as the last round leaves it.
        folder: where the rounds go. One run at a time; an unfinished run with the same settings is taken up.
        make_optimizer: ``model -> (optimizer, scheduler)``; the scheduler may be ``None``, and steps once an update. Called
            anew in every round. What this function did not make cannot be rewound.
        make_data: ``generator -> batches`` of one epoch, with a length; the generator is seeded by ``seed`` and the epoch.
        loss: ``(model, batch) -> scalar``, for the built-in loop.
        train: instead of ``loss``: a function that makes the updates of a `Run`.
        evaluate: ``model -> {name: number}``, after every round; tried once before the first one.
        epochs, retrain_epochs: epochs of the dense round, and of every other (the same if ``None``). Rounds that rewind to
            ``"init"`` or to a step end where the dense round does, whatever ``retrain_epochs`` is.
        rounds: rounds of pruning.
        rate: share of what is left that goes in each round; globs to shares for layers of their own (``{"output": 0.1}``),
            with ``"*"`` for the rest (0.2 if it is not named).
        target: instead of ``rate``: the sparsity of the last round; every round then takes the same share.
        sparsities: instead of ``rounds`` and ``rate``: what each round asks for, rising.
        rewind: ``"init"`` or a step k: weights, buffers, optimizer, scheduler, random numbers and the order of the data are
            those of that step of the dense round. ``"lr"``: the weights stay, the learning rate of the last
            ``retrain_epochs`` is run again. ``"linear"``: the weights stay, the learning rate goes to zero in a straight
            line after a warm-up. ``"finetune"``: the weights stay, the learning rate stays at its last value.
        controls: what to train beside every round, each as long as the round itself: ``"reinit"``, the same masks over weights
            drawn anew, and ``"random"``, random masks with the same counts over the weights the round began with (those of
            the dense round if they stay). They are in `Round.controls` of each round.
        seed: of the order of the data, and of the controls.
        **choice: allocation, pattern, include, ignore, max_sparsity, min_keep and roles, as for `secateur.prune`.

    Returns:
        The rounds, the dense one first.

    Raises:
        BadInput: a request that cannot be meant; a folder that is in use, belongs to other settings or was spoilt; a
            ``train`` that makes no updates, or more than it was asked for (fewer are counted in `Round.how`).
        BadTensor: the loss or a weight became NaN or infinite; the rounds before are kept.

    Example:
        >>> import tempfile, torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(20, 5), torch.randn(64, 20)
        >>> found = secateur.iterate(
        ...     model, tempfile.mkdtemp(), epochs=1, rounds=2, rate=0.5,
        ...     make_optimizer=lambda m: (torch.optim.SGD(m.parameters(), lr=0.1), None),
        ...     make_data=lambda g: x[torch.randperm(64, generator=g)].split(16),
        ...     loss=lambda m, batch: m(batch).square().mean(),
        ... )
        >>> [r.sparsity for r in found]
        [0.0, 0.5, 0.75]
    """
    if isinstance(rate, Mapping) and "allocation" in choice:
        raise BadInput("rates of layers are an allocation: leave allocation out, or give one rate.")
    if isinstance(controls, str) or any(c not in CONTROLS for c in controls):
        raise BadInput(f"controls is a sequence of some of {', '.join(map(repr, CONTROLS))}; got {controls!r}.")
    loop = _loop(loss, train)
    asked = _asked(rounds, rate, target) if sparsities is None else _given(sparsities)
    rounds = len(asked)
    again = epochs if retrain_epochs is None else retrain_epochs
    how = Settings(make_optimizer, make_data, loop, evaluate, epochs, again, rewind, tuple(controls), seed, choice)
    root = Path(folder)
    engine = Engine(model, root, how)
    engine.check(asked[-1])  # refuses now what would be refused after hours of training
    if not (root / "round-00").exists():
        engine.try_evaluate()
    settings = {
        "epochs": epochs, "retrain_epochs": retrain_epochs, "rounds": rounds, "rate": rate, "target": target,
        "sparsities": sparsities, "rewind": rewind, "controls": list(controls), "seed": seed,
        "choice": {k: repr(v) for k, v in sorted(choice.items())},
    }  # fmt: skip
    with locked(root, settings):
        done = read_rounds(root)
        for number in range(len(done), rounds + 1):
            done.append(engine.dense() if number == 0 else engine.round(number, asked[number - 1], done[-1]))
            _beside(engine, done, asked)
        _beside(engine, done, asked)
        done[-1].load(model)
        return done


def _beside(engine: Engine, done: Sequence[Round], asked: Sequence[Asked]) -> None:
    """Trains the controls that are not there yet; they then stand in the order asked for, also those that were read."""
    for made in done[1:]:
        for kind in engine.settings.controls:
            there = made.controls.pop(kind, None)
            made.controls[kind] = there or engine.control(kind, made, asked[made.number - 1], done[0])


def _given(sparsities: Sequence[float]) -> list[Asked]:
    found: list[Asked] = [check_sparsity(s, "sparsities") for s in sparsities]
    if not found or any(a >= b for a, b in pairwise(sparsities)):
        raise BadInput(f"sparsities must rise, one a round; got {list(sparsities)}.")
    return found


def _asked(rounds: int, rate: float | Mapping[str, float], target: float | None) -> list[Asked]:
    """What each round asks for, on the original size."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise BadInput(f"rounds is a number of rounds, an int >= 1; got {rounds!r}.")
    if target is not None:
        check_sparsity(target, "target")
        return [*(1 - (1 - target) ** (r / rounds) for r in range(1, rounds)), target]
    rates = dict(rate) if isinstance(rate, Mapping) else {"*": rate}
    for glob, share in rates.items():
        check_sparsity(share, f"rate[{glob!r}]")
    if not isinstance(rate, Mapping):
        return [1 - (1 - rate) ** r for r in range(1, rounds + 1)]
    return [{g: 1 - (1 - share) ** r for g, share in ({"*": 0.2} | rates).items()} for r in range(1, rounds + 1)]


def _loop(
    loss: Callable[[nn.Module, Any], Tensor] | None, train: Callable[[Run], None] | None
) -> Callable[[Run], None]:
    if loss is not None and train is None:
        return partial(_train, loss)
    if loss is not None or train is None:
        raise BadInput("give loss= for the built-in loop, or train= for one of your own; one of the two.")
    return train


def _train(loss: Callable[[nn.Module, Any], Tensor], run: Run) -> None:
    """The built-in loop."""
    run.model.train()
    for step, batch in run.batches():
        update(loss(run.model, batch), run.model, run.optimizer, run.scheduler, f"{run.what}, step {step}")
