"""Patterns: what each accepts, whom it refuses, its units, and the short forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.core.combine import Choice, why_refused
from secateur.core.criteria import magnitude
from secateur.core.patterns import NM, Block, Channel, Grid, Pattern, Unstructured
from secateur.core.request import Request
from secateur.core.spelling import allocation_of, criterion_of, pattern_of
from secateur.core.types import Spec
from secateur.errors import BadInput, NotDefined
from tests.property import oracles


def spec(shape: tuple[int, ...], **more: Any) -> Spec:
    return Spec("w", shape, torch.float32, **{"role": "linear", "out_dim": 0, "in_dim": 1, **more})


SPELLED = [
    ("unstructured", Unstructured(), "unstructured"),
    ("2:4", NM(2, 4), "2:4"),
    (" 1:16 ", NM(1, 16), "1:16"),
    ("4x4", Block((4, 4)), "4x4"),
    ("1X8", Block((1, 8)), "1x8"),
    ("channel", Channel("out"), "channel"),
    ("channel:out", Channel("out"), "channel"),
    ("Channel:in", Channel("in"), "channel:in"),
]


@pytest.mark.parametrize(("text", "pattern", "again"), SPELLED, ids=lambda v: str(v))
def test_short_forms(text: str, pattern: Pattern, again: str) -> None:
    assert pattern_of(text) == pattern == pattern_of(pattern) and str(pattern) == again
    assert pattern_of(str(pattern)) == pattern


@pytest.mark.parametrize(
    "value",
    [
        *(
            "2:2",
            "4:2",
            "0:4",
            "2:",
            ":4",
            "2:4:8",
            "-1:4",
            "0x4",
            "4x",
            "4x4x4",
            "4×4",
            "block",
            "",
            "1" * 5000 + ":2",
        ),
        *(None, 4, (2, 4), NM, object()),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_what_is_no_pattern(value: object) -> None:
    with pytest.raises(BadInput):
        pattern_of(value)


def test_what_makes_no_pattern() -> None:
    for keep, of in ((2, 2), (0, 4), (4, 2), (-1, 4), (True, 4), (2.0, 4), ("2", "4")):
        with pytest.raises(BadInput, match="N:M keeps N of every M"):
            NM(keep, of)  # type: ignore[arg-type]
    for shape in ((0, 4), (4,), (4, 4, 4), [4, 4], 4, (4, True), (4.0, 4)):
        with pytest.raises(BadInput, match="two ints >= 1"):
            Block(shape)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match='"out" or "in"'):
        Channel("row")  # type: ignore[arg-type]
    for make in (lambda: Block((2, 2), "sum"), lambda: Channel("out", "median")):  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="mean, l1, l2, max"):
            make()


WHO_CANNOT = [
    (NM(2, 4), spec((3, 6)), "6 inputs do not divide into groups of 4"),
    (NM(2, 4), spec((8,), out_dim=None, in_dim=None, role="unknown"), "not known"),
    (NM(2, 4), spec((8, 3, 7, 7), role="conv"), "3 inputs do not divide"),
    (Block((2, 2)), spec((3, 4)), "3 outputs and 4 inputs are not multiples of 2 and 2"),
    (Block((2, 2)), spec((4,), in_dim=None), "need an output and an input dimension"),
    (Channel("out"), spec((4,), out_dim=None), "which dimension holds the output channels"),
    (Channel("in"), spec((4,), in_dim=None), "which dimension holds the input channels"),
    (Channel("out"), spec((8, 4), role="recurrent"), "spans its gates"),
    (Channel("in"), spec((8, 2, 3, 3), role="conv", groups=2), "with groups=2 an input channel"),
    (Channel("out"), spec((8, 2, 3, 3), role="conv_transpose", out_dim=1, in_dim=0, groups=2), "with groups=2 an out"),
]


@pytest.mark.parametrize(("pattern", "whom", "why"), WHO_CANNOT, ids=lambda v: str(v)[:30])
def test_who_cannot_carry_a_pattern(pattern: Pattern, whom: Spec, why: str) -> None:
    assert why in str(pattern.why_not(whom))


CAN = [
    (Unstructured(), spec((), out_dim=None, in_dim=None, role="unknown")),
    (NM(2, 4), spec((3, 8))),
    (Block((3, 2)), spec((6, 4, 5), role="conv")),
    (Channel("out"), spec((8, 2, 3, 3), role="conv", groups=2)),
    (Channel("in"), spec((8, 2, 3), role="conv_transpose", out_dim=1, in_dim=0, groups=2)),
]


@pytest.mark.parametrize(("pattern", "whom"), CAN, ids=lambda v: str(v)[:30])
def test_who_can(pattern: Pattern, whom: Spec) -> None:
    assert pattern.why_not(whom) is None


GRIDS = [
    (Block((2, 3)), spec((4, 6)), (2, 3)),
    (Block((2, 3)), spec((6, 4), out_dim=1, in_dim=0), (3, 2)),
    (Block((2, 1)), spec((4, 2, 2, 3), role="conv"), (2, 1, 1, 1)),
    (Block((1, 2)), spec((3, 2, 4), role="experts", out_dim=1, in_dim=2, batch_dims=(0,)), (1, 1, 2)),
    (Channel("out"), spec((4, 2, 2, 3), role="conv"), (1, 2, 2, 3)),
    (Channel("in"), spec((4, 2, 2, 3), role="conv"), (4, 1, 2, 3)),
    (Channel("out"), spec((3, 2, 4), role="experts", out_dim=1, in_dim=2, batch_dims=(0,)), (1, 1, 4)),
    (Channel("in"), spec((3, 2, 4), role="experts", out_dim=1, in_dim=2, batch_dims=(0,)), (1, 2, 1)),
    (Channel("out"), spec((1, 5)), (1, 5)),
]


@pytest.mark.parametrize(("pattern", "whom", "edges"), GRIDS, ids=lambda v: str(v)[:30])
def test_every_element_belongs_to_one_unit(pattern: Block | Channel, whom: Spec, edges: tuple[int, ...]) -> None:
    grid: Grid = pattern.grid(whom)
    listed = oracles.units("w", whom.shape, edges)
    assert (grid.units, grid.unit_size) == (len(listed), len(listed[0][1]))
    unit: Tensor = grid.unit_of(torch.arange(whom.numel))
    for i, (_, cells) in enumerate(listed):
        assert (unit == i).nonzero().reshape(-1).tolist() == cells


def test_an_output_channel_takes_its_bias_along() -> None:
    whom = spec((4, 2), bias="b")
    assert [m.name for m in Channel("out").grid(whom).followers] == ["b"]
    assert Channel("in").grid(whom).followers == () and Block((2, 2)).grid(whom).followers == ()
    assert Channel("out").grid(spec((4, 2))).followers == ()


def whatever(weight: Tensor) -> Tensor:
    return weight


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "2:4", "allocation": "uniform"}, "2:4 fixes how many weights every tensor loses, so no allocation"),
    ({"pattern": "2:4", "allocation": {"*": 0.5}}, "no allocation applies"),
    ({"pattern": "2:4", "max_sparsity": 0.5}, "max_sparsity and min_keep do not apply"),
    ({"pattern": "2:4", "min_keep": 1}, "max_sparsity and min_keep do not apply"),
    ({"pattern": "2:4", "threshold": 0.1}, "a threshold does not apply"),
    ({"pattern": "2:4", "sparsity": 0.9}, "2:4 means sparsity 0.5; got sparsity=0.9"),
    ({"pattern": "2:8", "sparsity": 0.25}, "2:8 means sparsity 0.75; got sparsity=0.25"),
    ({"sparsity": 0.5, "threshold": 0.1}, "two answers to one question"),
    ({"threshold": 0.1, "allocation": "erk"}, "a threshold decides every count itself"),
    ({"threshold": 0.1, "min_keep": 3}, "a threshold decides every count itself"),
    ({"threshold": 0.1, "criterion": "random"}, "a threshold is a magnitude"),
    ({"threshold": 0.1, "pattern": "4x4"}, "compares single weights, not 4x4 units"),
    ({"sparsity": 0.5, "allocation": "lamp", "criterion": "random"}, "LAMP is defined on magnitudes"),
    ({"sparsity": 0.5, "allocation": "lamp", "pattern": "channel"}, "LAMP scores single weights, not channel units"),
    ({"sparsity": 0.5, "allocation": "lamp", "nonfinite": "keep"}, "every weight must be finite"),
    ({"allocation": {"*": 0.5}, "max_sparsity": 0.9}, "gives every count itself"),
    ({"sparsity": 0.5, "allocation": lambda rows, sparsity: {}, "min_keep": 1}, "gives every count itself"),
    ({"sparsity": 0.5, "pattern": "2x2", "criterion": whatever, "nonfinite": "keep"}, "is defined for magnitude"),
]


@pytest.mark.parametrize(("asked", "why"), REFUSED, ids=lambda v: str(v)[:60])
def test_combinations_that_mean_nothing_are_refused(asked: dict[str, Any], why: str) -> None:
    w = {"a.weight": torch.ones(8, 8)}
    with pytest.raises(NotDefined) as e:
        secateur.prune(w, **asked)
    assert why in str(e.value)
    assert bool((w["a.weight"] == 1).all())


SLIPS: list[tuple[dict[str, Any], str]] = [
    ({}, "say how much to prune"),
    ({"threshold": 0}, "0 < threshold < inf"),
    ({"threshold": -1.0}, "0 < threshold < inf"),
    ({"threshold": float("nan")}, "0 < threshold < inf"),
    ({"threshold": True}, "Python number"),
    ({"threshold": torch.tensor(0.1)}, "Python number"),
    ({"sparsity": 0.5, "min_keep": -1}, "min_keep is a count"),
    ({"sparsity": 0.5, "min_keep": 0.5}, "min_keep is a count"),
    ({"sparsity": 0.5, "max_sparsity": 1}, "max_sparsity"),
    ({"sparsity": 0.5, "max_sparsity": {"a": 90}}, "Did you mean 0.9?"),
    ({"allocation": {"a": 90}}, "Did you mean 0.9?"),
    ({"sparsity": 0.5, "nonfinite": "skip"}, "one of error, keep, prune"),
    ({"sparsity": 0.5, "allocation": "erdos"}, "one of global, uniform"),
    ({"sparsity": 0.5, "criterion": "taylor"}, "pass calibration="),
    ({"sparsity": 0.5, "criterion": lambda weight, *, grad: weight}, "asks for 'grad'"),
    ({"sparsity": 0.5, "criterion": lambda: 1}, "takes no arguments"),
    ({"sparsity": 0.5, "criterion": 3}, "criterion must be"),
]


@pytest.mark.parametrize(("asked", "says"), SLIPS, ids=lambda v: str(v)[:60])
def test_slips(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput) as e:
        Request.of(**asked)
    assert says in str(e.value)


def test_aliases_and_defaults() -> None:
    assert [allocation_of(a) for a in ("local", "LAYERWISE", "uniform+")] == ["uniform", "uniform", "uniform_plus"]
    assert criterion_of("magnitude") is magnitude and criterion_of("random") == secateur.random(0)
    assert Request.of(0.5, pattern="2x2").pattern == Block((2, 2), "mean")
    assert Request.of(0.5, pattern="channel", allocation="erk").pattern == Channel("out", "l2")
    assert Request.of(0.5, pattern=Channel("in", "max")).pattern == Channel("in", "max")
    assert Request.of(pattern="3:4").sparsity == 0.25
    assert why_refused(Choice(NM(2, 4), "global", magnitude, sparsity=0.5)) is None
