"""Layers one after another in a network of any form: the model runs anew for each, with those before as they are by then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.core.types import Spec

from .batches import Forward, run_all
from .blocks import Block
from .watch import Watch


class Reruns:
    """What `secateur.evaluate.walk.Walk` is for blocks that feed each other, for layers with anything between them.

    It takes one run of the model a layer and batch, where a walk takes two of each block.

    Args:
        model: the network, in evaluation mode.
        blocks: one for each layer, in any order.
        batches: kept, and run again for every layer.
        forward: runs the model on a batch; see `secateur.Calibration`.
        weights: ``(spec, the model's own parameter)`` of every layer.

    Attributes:
        blocks: in the order they run on the first batch.

    Raises:
        BadInput: no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        forward: Forward | None,
        weights: Sequence[tuple[Spec, Tensor]],
    ) -> None:
        self._model, self._batches, self._forward = model, list(batches), forward
        with Watch(weights, gram=False) as watch:
            run_all(model, self._batches[:1], forward)
        place = {name: i for i, name in enumerate(watch.order)}
        self.blocks = sorted(blocks, key=lambda b: min((i for n, i in place.items() if b.holds(n)), default=len(place)))

    def observe(self, number: int) -> None:
        """Runs every batch through the whole model."""
        run_all(self._model, self._batches, self._forward)

    def advance(self, number: int) -> None:
        """Nothing is kept between layers."""
