"""Blocks and channels of other sizes, and every way to make a unit's scores one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import secateur
from secateur import Block, Channel
from tests.contract import oracle
from tests.contract.nets import CHOSEN, is_zero, net
from tests.contract.table import expected_warnings

REDUCED = ("mean", "l1", "l2", "max")
MAKERS: dict[str, Any] = {
    "2x4": lambda r: Block((2, 4), reduce=r),
    "1x4": lambda r: Block((1, 4), reduce=r),
    "4x1": lambda r: Block((4, 1), reduce=r),
    "out": lambda r: Channel("out", reduce=r),
    "in": lambda r: Channel("in", reduce=r),
}


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("reduce", [None, *REDUCED])
@pytest.mark.parametrize("shape", MAKERS)
def test_units_go_in_the_order_of_their_score(shape: str, reduce: str | None, allocation: str) -> None:
    pattern = MAKERS[shape](reduce)
    reduce = reduce or ("mean" if allocation == "global" else "l2")
    for dtype, kind in (("float32", "plain"), ("bfloat16", "ties")):
        model = net(dtype, kind)  # type: ignore[arg-type]
        pool = {n: model.get_parameter(n).detach().clone() for n in CHOSEN}
        with expected_warnings():
            secateur.prune(model, 0.5, pattern=pattern, allocation=allocation)
        must = {}
        for part in [pool] if allocation == "global" else [{n: t} for n, t in pool.items()]:
            k = oracle.count(sum(t.numel() for t in part.values()), 0.5)
            must |= oracle.gone(pattern, "magnitude", part, k, reduce=reduce)
        for name in CHOSEN:
            assert np.array_equal(is_zero(model.get_parameter(name)).numpy(), must[name]), (name, dtype)


def test_the_default_is_the_mean_between_tensors_and_the_norm_within() -> None:
    def planned(pattern: Any, allocation: str) -> Any:
        return secateur.plan(net(), 0.5, pattern=pattern, allocation=allocation)

    assert planned("4x4", "global").rows == planned(Block((4, 4), reduce="mean"), "global").rows
    assert planned("4x4", "uniform").rows == planned(Block((4, 4), reduce="l2"), "uniform").rows


def test_an_output_channel_takes_its_bias_along_and_an_input_channel_does_not() -> None:
    for side in ("out", "in"):
        model = net()
        bias = model.conv.bias
        assert bias is not None
        before = bias.detach().clone()
        with expected_warnings():
            report = secateur.prune(model, 0.5, allocation="uniform", pattern=Channel(side))  # type: ignore[arg-type]
        dead = is_zero(model.conv.weight).all(dim=(1, 2, 3)) & torch.tensor(side == "out")
        assert int(dead.sum()) == (4 if side == "out" else 0)
        assert torch.equal(bias.detach(), before.masked_fill(dead, 0))
        assert report["conv.bias"].zeros == int(dead.sum())
        assert report.zeros == sum(int(is_zero(model.get_parameter(n)).sum()) for n in CHOSEN)  # without biases
        assert report.total == 480
