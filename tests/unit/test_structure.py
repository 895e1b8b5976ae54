"""Scores of whole channels and heads: each by its formula, spread over the unit, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.core import structure
from secateur.core.saliency import NAMED, STATISTICS, bind, needs
from secateur.core.types import Spec
from secateur.errors import BadInput
from tests.property.worlds import selecting, whole

VALUES = torch.tensor([0.25, 0.0, 3.0, 0.5])
BY_CHANNEL: dict[str, tuple[Callable[..., Tensor], str, Tensor]] = {
    "mean_activation": (structure.mean_activation, "channel_activation", VALUES),
    "apoz": (structure.apoz, "channel_apoz", 1 - VALUES / 3),
    "batchnorm_scale": (structure.batchnorm_scale, "norm_scale", torch.tensor([-0.25, 0.0, 3.0, -0.5])),
    "taylor_channel": (structure.taylor_channel, "channel_taylor", VALUES),
}


@pytest.mark.parametrize("name", BY_CHANNEL)
@pytest.mark.parametrize(("shape", "out_dim"), [((4, 3), 0), ((3, 4), 1), ((4, 2, 3, 3), 0), ((2, 4, 3), 1)])
def test_every_weight_has_the_score_of_its_channel(name: str, shape: tuple[int, ...], out_dim: int) -> None:
    criterion, statistic, values = BY_CHANNEL[name]
    scores = criterion(torch.randn(shape), **{statistic: values}, out_dim=out_dim)
    assert scores.shape == shape and scores.dtype == torch.float32
    for channel, own in enumerate(scores.unbind(out_dim)):
        assert torch.allclose(own, (VALUES / 3 if name == "apoz" else VALUES)[channel].expand_as(own))


@pytest.mark.parametrize("name", BY_CHANNEL)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_a_channel_of_ones_scores_what_it_was_given(name: str, reduce: Any) -> None:
    """Under a pattern, the mean over a unit is the unit's own score: an order of channels, whatever their sizes."""
    criterion, statistic, values = BY_CHANNEL[name]
    tensors = {"a": torch.randn(4, 3, 2), "b": torch.randn(4, 7)}
    specs = [Spec(n, tuple(t.shape), t.dtype, "linear", 0, 1) for n, t in tensors.items()]
    bound = bind(criterion, {n: {statistic: values} for n in tensors}, dict.fromkeys(tensors, (0, 1)))
    pattern = secateur.Channel("out", reduce)
    selector = selecting(whole(tensors), pattern, bound)
    a, b = (selector.table(s).keys for s in specs)  # type: ignore[attr-defined]
    assert torch.equal(torch.argsort(a), torch.argsort(VALUES)) and torch.equal(torch.argsort(b), torch.argsort(VALUES))
    if reduce == "max":
        assert torch.equal(a, b)


def test_zeros_lower_the_mean_and_not_the_largest() -> None:
    state = {"w.weight": torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])}
    known = {"w.weight": {"channel_activation": torch.tensor([2.0, 1.0])}}
    for reduce, lost in (("mean", 0), ("max", 1)):
        copy = {n: t.clone() for n, t in state.items()}
        pattern = secateur.Channel("out", reduce)  # type: ignore[arg-type]
        secateur.prune(copy, 0.5, criterion=structure.mean_activation, statistics=known, pattern=pattern)
        assert (copy["w.weight"] == 0).all(1).tolist() == [lost == 0, lost == 1]


@pytest.mark.parametrize("name", BY_CHANNEL)
@pytest.mark.parametrize("shape", [(3,), (4, 1), (), (5,)])
def test_a_statistic_of_another_layer_is_refused(name: str, shape: tuple[int, ...]) -> None:
    criterion, statistic, _ = BY_CHANNEL[name]
    with pytest.raises(BadInput, match=f"{statistic} has the shape .*4 output channels it is"):
        criterion(torch.ones(4, 2), **{statistic: torch.ones(shape)}, out_dim=0)


def test_heads_broadcast_along_the_dim_they_lie_in() -> None:
    by_row = structure.head_importance(torch.ones(4, 3), head_gradient=torch.tensor([[1.0], [1.0], [2.0], [2.0]]))
    by_column = structure.head_importance(torch.ones(3, 4), head_gradient=torch.tensor([[1.0, 1.0, 2.0, 2.0]]))
    assert torch.equal(by_row, by_column.t())
    for shape in ((4,), (3, 1), (2, 4), (1, 1, 4)):
        with pytest.raises(BadInput, match="does not broadcast"):
            structure.head_importance(torch.ones(4, 4), head_gradient=torch.ones(shape))


def test_all_are_known_by_name() -> None:
    for name in (*BY_CHANNEL, "head_importance"):
        assert NAMED[name] is getattr(structure, name)
        assert set(needs(NAMED[name])) <= set(STATISTICS) and len(needs(NAMED[name])) == 1
