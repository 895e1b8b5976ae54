"""Loops with the learning rates of published recipes that a recipe's ``learning_rate`` has no word for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from secateur.recipe.schema import Call
from secateur.recipe.training import loss_of, resolve
from secateur.train.engine import Run, update


def stepwise(run: Run, milestones: Sequence[float], warm_up: float = 0.0, loss: Any = None) -> None:
    """The learning rate rises for ``warm_up`` epochs, stays, and falls to a tenth at each milestone.

    It is a function of the step alone, so that ``iterate`` can rewind it: by ``lr``, ``init`` or a step. After
    ``rewind: finetune`` the rate stays where the dense training left it.

    Args:
        run: what to train.
        milestones, warm_up: in epochs.
        loss: a function of the recipe's kind, ``package.module:function`` with arguments if need be; else the usual loss.
    """

    def share(epoch: float) -> float:
        up = min(1.0, epoch / warm_up) if warm_up else 1.0
        return float(up * 0.1 ** sum(epoch >= m for m in milestones))

    _train(run, share, loss)


def cycles(run: Run, restarts: Sequence[float], last: float = 0.1, loss: Any = None) -> None:
    """The learning rate falls in a line from 1 to ``last`` of itself, and starts again, as in the recipes of oBERT.

    Args:
        run: what to train.
        restarts: the epochs where it starts again, from 0 to the end of the training.
        last: the share it falls to.
        loss: as in `stepwise`.
    """

    def share(epoch: float) -> float:
        for a, b in itertools.pairwise(restarts):
            if a <= epoch < b:
                return 1 - (1 - last) * (epoch - a) / (b - a)
        return last

    _train(run, share, loss)


def _train(run: Run, share: Callable[[float], float], loss: Any) -> None:
    value = loss_of if loss is None else resolve(Call.model_validate(loss))
    run.model.train()
    for step, batch in run.batches():
        if run.scheduler is not None:
            for group in run.optimizer.param_groups:
                # The rate of the middle of the step: one that rises from zero is not zero at first.
                group["lr"] = group["initial_lr"] * share((step + 0.5) / run.steps_per_epoch)
        update(value(run.model, batch), run.model, run.optimizer, None, f"step {step}")
