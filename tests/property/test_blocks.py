"""Blocks and channels against a brute force in exact fractions: which units go, in what order, and how many fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.heads import UnitPattern
from secateur.core.plan import keep_mask
from secateur.core.types import Align, Part, Reduce, Spec

from . import oracles
from .worlds import Exchange, Pieces, example, going, gone_of, routes, selecting, specs_of, whole

REDUCTIONS = ["mean", "l1", "l2", "max"]


@dataclass(frozen=True)
class Kind:
    """Some tensors of one role under a unit pattern, and the edges that its units have along each dim (0: all of it)."""

    pattern: UnitPattern
    shapes: Mapping[str, tuple[int, ...]]
    edges: tuple[int, ...]
    role: str = "linear"
    out_dim: int = 0
    in_dim: int = 1
    batch_dims: tuple[int, ...] = ()

    def specs(self, tensors: Mapping[str, Tensor]) -> list[Spec]:
        dims = {"out_dim": self.out_dim, "in_dim": self.in_dim, "batch_dims": self.batch_dims}
        return specs_of(tensors, role=self.role, **dims)

    def units(self) -> oracles.Units:
        listed: oracles.Units = []
        for name, shape in sorted(self.shapes.items()):
            listed += oracles.units(name, shape, [e or s for e, s in zip(self.edges, shape, strict=True)])
        return listed


FLAT = {"b": (4, 6), "a": (2, 4), "c": (6, 2)}
CONV = {"b": (4, 2, 2, 3), "a": (2, 4, 1, 1)}
STACK = {"b": (2, 4, 2), "a": (3, 2, 4)}
KINDS = {
    "block": Kind(secateur.Block((2, 2)), FLAT, (2, 2)),
    "block 1x2": Kind(secateur.Block((1, 2)), FLAT, (1, 2)),
    "transposed": Kind(secateur.Block((1, 2)), FLAT, (2, 1), "linear_transposed", 1, 0),
    "block of conv": Kind(secateur.Block((2, 1)), CONV, (2, 1, 1, 1), "conv"),
    "block of experts": Kind(secateur.Block((2, 2)), STACK, (1, 2, 2), "experts", 1, 2, (0,)),
    "channel": Kind(secateur.Channel("out"), FLAT, (1, 0)),
    "channel in": Kind(secateur.Channel("in"), FLAT, (0, 1)),
    "filter": Kind(secateur.Channel("out"), CONV, (1, 0, 0, 0), "conv"),
    "filter in": Kind(secateur.Channel("in"), CONV, (0, 1, 0, 0), "conv"),
    "channel of experts": Kind(secateur.Channel("out"), STACK, (1, 1, 0), "experts", 1, 2, (0,)),
}


def with_reduction(pattern: UnitPattern, reduce: str) -> UnitPattern:
    if isinstance(pattern, secateur.Block):
        return secateur.Block(pattern.shape, reduce)  # type: ignore[arg-type]
    return secateur.Channel(pattern.side, reduce)  # type: ignore[arg-type]


def draw_tensors(data: st.DataObject, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Small whole numbers (so that units tie, and whole units are zero) or normals, of any dtype that holds them."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]))
    out = {}
    for name, shape in shapes.items():
        if data.draw(st.booleans()):
            out[name] = example(shape, dtype, data.draw(st.sampled_from(["normal", "sparse"])))
        else:
            n = torch.Size(shape).numel()
            drawn = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, -2, 3]), min_size=n, max_size=n))
            out[name] = torch.tensor(drawn, dtype=torch.float64).view(shape).to(dtype)
    return out


def gone_by_units(tensors: Mapping[str, Tensor], listed: oracles.Units, which: list[int]) -> dict[str, set[int]]:
    gone: dict[str, set[int]] = {n: set() for n in tensors}
    for i in which:
        gone[listed[i][0]].update(listed[i][1])
    return gone


def places(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().reshape(-1).tolist())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(st.data())
def test_pooled_and_alone(kind: str, reduce: str, data: st.DataObject) -> None:
    """All tensors as one pool, and each on its own, from whole tensors and from pieces."""
    k = KINDS[kind]
    tensors = draw_tensors(data, k.shapes)
    pattern, specs, listed = with_reduction(k.pattern, reduce), k.specs(tensors), k.units()
    n = sum(t.numel() for t in tensors.values())
    count = data.draw(st.integers(0, n))
    pieces = Pieces(tensors, data.draw(st.sampled_from([3, 7, 11])), data.draw(st.booleans()))
    expected = gone_by_units(tensors, listed, oracles.smallest_units(tensors, listed, count, reduce))
    for parts in (whole(tensors), pieces.parts):
        selector = selecting(parts, pattern)
        for spec, taken in zip(specs, selector.take(specs, count), strict=True):
            gone = gone_of(selector, spec, taken)
            assert places(gone) == expected[spec.name]
            zeros = torch.from_numpy(oracles.values(tensors[spec.name]) == 0)
            assert (taken.pruned, taken.zeros) == (int((gone | zeros).sum()), int(zeros.sum()))
    for spec in specs:
        own = [u for u in listed if u[0] == spec.name]
        some = min(count, spec.numel)
        (taken,) = selector.take([spec], some)
        alone = gone_by_units(tensors, own, oracles.smallest_units(tensors, own, some, reduce))
        assert places(gone_of(selector, spec, taken)) == alone[spec.name]


def every_second_tensor(tensors: Mapping[str, Tensor], worker: int, spec: Spec, align: Align) -> list[Part]:
    """What a worker holds where each tensor lies with one of two."""
    return [Part(spec, tensors[spec.name])] if sorted(tensors).index(spec.name) % 2 == worker else []


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", ["block", "filter", "channel in"])
@settings(max_examples=4)
@given(st.data())
def test_two_workers(kind: str, reduce: str, data: st.DataObject) -> None:
    """Sums of units that lie with both workers, the maxima of units that one holds, and the criterion that scores ids."""
    k = KINDS[kind]
    tensors = draw_tensors(data, k.shapes)
    pattern, specs = with_reduction(k.pattern, reduce), k.specs(tensors)
    count = data.draw(st.integers(0, sum(t.numel() for t in tensors.values())))
    size = data.draw(st.sampled_from([2, 5]))
    for criterion in (secateur.magnitude, secateur.random(1)):
        one = selecting(whole(tensors), pattern, criterion).take(specs, count)

        def job(worker: int, reduce: Reduce, c: object = criterion) -> object:
            parts = Pieces(tensors, size, worker=worker, workers=2).parts
            if pattern.reduce == "max":
                parts = partial(every_second_tensor, tensors, worker)
            return selecting(parts, pattern, c, reduce).take(specs, count)  # type: ignore[arg-type]

        assert Exchange(2).run(job) == [one, one]


def test_the_default_score_pooled_is_the_mean_and_alone_l2() -> None:
    """A sum would call the wide layer's channels larger; l2 would let one large weight save its channel."""
    w = {"a.weight": torch.full((2, 2), 3.0), "b.weight": torch.full((2, 8), 2.0)}
    with pytest.warns(secateur.SecateurWarning, match="left with nothing: b.weight"):
        secateur.prune(w, 0.8, pattern="channel")
    assert bool((w["a.weight"] == 3).all()) and bool((w["b.weight"] == 0).all())
    w = {"a.weight": torch.tensor([[2.0, 2.0], [0.1, 3.0]])}
    secateur.prune(w, 0.5, pattern="channel", allocation="uniform")
    assert w["a.weight"][0].tolist() == [0, 0]
    w = {"a.weight": torch.tensor([[2.0, 2.0], [0.1, 3.0]])}
    secateur.prune(w, 0.5, pattern="channel")
    assert w["a.weight"][0].tolist() == [2, 2]


@routes
@pytest.mark.parametrize("pattern", ["channel", "2x2"])
def test_a_bias_goes_with_its_output_channels(route: tuple[str, int], pattern: str) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 6))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with going(route):
        report = secateur.prune(model, 0.4, pattern=pattern, ignore="0" if pattern == "2x2" else None)
    for layer in ("0", "2"):
        weight, bias = (model.get_parameter(f"{layer}.{n}") for n in ("weight", "bias"))
        gone = (weight.reshape(weight.shape[0], -1) == 0).all(1) & (pattern == "channel")
        assert torch.equal(bias, torch.where(gone, 0, before[f"{layer}.bias"]))
    assert report.total == sum(before[f"{i}.weight"].numel() for i in ("0", "2") if pattern == "channel" or i == "2")
    assert 0 < report.zeros <= round(0.4 * report.total)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@settings(max_examples=30)
@given(st.data(), st.sampled_from(["2x2", "channel", "channel:in"]), st.sampled_from(["global", "uniform", "erk"]))
def test_twice_is_once_and_sparser_is_inside(data: st.DataObject, pattern: str, allocation: str) -> None:
    tensors = {f"{n}.weight": t for n, t in draw_tensors(data, FLAT).items()}
    if not any(bool(secateur.masks({n: t})[n].any()) for n, t in tensors.items()):
        tensors["b.weight"] = example((4, 6), torch.float32)
    low, high = sorted(data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    masks = []
    for s in (low / 10, high / 10):
        copy = {n: t.clone() for n, t in tensors.items()}
        secateur.prune(copy, s, pattern=pattern, allocation=allocation)
        once = secateur.masks(copy)
        secateur.prune(copy, s, pattern=pattern, allocation=allocation)
        assert all(torch.equal(once[n], m) for n, m in secateur.masks(copy).items())
        masks.append(once)
    assert all(bool((masks[0][n] | ~masks[1][n]).all()) for n in tensors)


def test_a_mask_of_units_needs_the_whole_tensor() -> None:
    w = {"a.weight": example((4, 6), torch.float32)}
    plan = secateur.plan(w, 0.5, pattern="2x2")
    spec = plan.rows[0].spec
    assert bool(keep_mask(plan, Part(spec, w["a.weight"])).any())
    with pytest.raises(secateur.PlanMismatch, match="whole tensor"):
        keep_mask(plan, Part(spec, w["a.weight"][:2]))
