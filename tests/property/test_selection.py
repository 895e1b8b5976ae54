"""The selection against a full stable sort: every dtype, ties, any route, any way of cutting tensors into pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur import native
from secateur.core import fast
from secateur.core.choose import Taken
from secateur.core.make import make
from secateur.core.plan import Plan, keep_mask
from secateur.core.request import Request
from secateur.core.types import Part, Reduce, Spec
from secateur.stores.base import matches

from . import oracles
from .worlds import (
    DTYPES,
    FILLS,
    Exchange,
    Pieces,
    counts_of,
    dtypes,
    example,
    going,
    gone_of,
    pools,
    routes,
    selecting,
    specs_of,
    whole,
)

Pool = dict[str, Tensor]


def check(tensors: Pool, count: int, specs: list[Spec], taken: list[Taken], found: list[Tensor]) -> None:
    """What was selected is what the sort says, and what is said of it is so."""
    expected = oracles.smallest(tensors, count)
    for spec, t, gone in zip(specs, taken, found, strict=True):
        w, want = tensors[spec.name], expected[spec.name]
        np.testing.assert_array_equal(gone.numpy(), want, err_msg=str(spec))
        assert (t.pruned, t.zeros) == (int(want.sum()), int((oracles.values(w) == 0).sum()))
        assert t.threshold == oracles.smallest_survivor(w, want)
    zeros = sum(t.zeros for t in taken)
    assert sum(t.pruned for t in taken) == max(count, zeros)


def select(tensors: Pool, count: int, resident: bool = True) -> list[Taken]:
    """Selects from whole tensors, and checks the answer."""
    specs, selector = specs_of(tensors), selecting(whole(tensors, resident))
    taken = selector.take(specs, count)
    check(tensors, count, specs, taken, [gone_of(selector, s, t) for s, t in zip(specs, taken, strict=True)])
    return taken


@routes
@dtypes
@settings(max_examples=8)
@given(st.data())
def test_one_dtype(route: tuple[str, int], dtype: torch.dtype, data: st.DataObject) -> None:
    tensors = data.draw(pools(dtype))
    with going(route):
        select(tensors, data.draw(counts_of(tensors)))


@settings(max_examples=40)
@given(st.data())
def test_mixed_dtypes_give_the_same_cuts_by_every_route(data: st.DataObject) -> None:
    tensors = data.draw(pools())
    count = data.draw(counts_of(tensors))
    cuts = []
    for route in (("native", 1), ("torch", 1)):
        with going(route):
            cuts += [select(tensors, count), select(tensors, count, resident=False)]
    assert cuts[0] == cuts[1] == cuts[2] == cuts[3]


@pytest.mark.skipif(not native.available(), reason="built without the native kernels")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if "fnuz" not in str(d)], ids=str)
def test_the_fast_route_is_taken_and_gives_the_same_cuts(dtype: torch.dtype) -> None:
    """Where tensors of one dtype are in memory. Otherwise the tests above would compare the twin with itself."""
    tensors = {
        f"t{i}": example((n,), dtype, fill, i)
        for i, (n, fill) in enumerate(zip((900, 0, 1, 70, 500), FILLS, strict=False))
    }
    specs = specs_of(tensors)
    for count in (1, 400, 1470):
        picked = fast.pick(specs, whole(tensors), count)
        assert picked is not None
        with going(("torch", 1)):
            assert [p.cut for p in picked] == [t.cut for t in selecting(whole(tensors)).take(specs, count)]


@routes
@dtypes
def test_large_enough_to_sample(route: tuple[str, int], dtype: torch.dtype) -> None:
    """Brackets, and what happens where they miss: many ties, most weights zero, sizes far apart."""
    pool = {
        "a": example((30_000,), dtype),
        "b": example((200, 101), dtype, "any bits"),
        "c": example((50,), dtype, "few values"),
        "d": example((17_011,), dtype, "sparse"),
    }
    n = sum(t.numel() for t in pool.values())
    with going(route):
        for count in (1, n // 2, n - n // 10):
            select(pool, count)


@pytest.mark.parametrize("fill", FILLS)
@routes
def test_one_large_tensor_of_one_kind(route: tuple[str, int], fill: str) -> None:
    t = example((70_001,), torch.bfloat16, fill)
    with going(route):
        for count in (1, 35_000, 70_000):
            select({"w": t}, count)


@routes
def test_a_million_bfloat16_ties(route: tuple[str, int]) -> None:
    """A million normals hold some two thousand magnitudes, and more elements than one chunk of the torch routine."""
    t = {"w": example((1_100_003,), torch.bfloat16)}
    assert np.unique(np.abs(oracles.values(t["w"]))).size < 5000
    with going(route):
        select(t, 990_003)


@routes
@settings(max_examples=15)
@given(st.data())
def test_where_values_of_one_dtype_lie_between_those_of_another(route: tuple[str, int], data: st.DataObject) -> None:
    """The same numbers in every dtype, so that ties run across tensors, and a cut may fall between a dtype's numbers."""
    base = example((data.draw(st.integers(1, 40)),), torch.float64, seed=data.draw(st.integers(0, 3)))
    pool = {f"t{i}": base.to(d) for i, d in enumerate(data.draw(st.permutations(DTYPES))[:4])}
    with going(route):
        select(pool, data.draw(counts_of(pool)))


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[int, bool]:
    """(elements of a piece, strided): small odd pieces, contiguous or with an index tensor."""
    return draw(st.sampled_from([3, 17, 101])), draw(st.booleans())


@pytest.mark.parametrize("route", [("native", 2), ("torch", 1)], ids=["native", "torch"])
@settings(max_examples=20)
@given(st.data(), cuttings())
def test_any_pieces_give_the_same_cuts(route: tuple[str, int], data: st.DataObject, cutting: tuple[int, bool]) -> None:
    tensors = data.draw(pools(most=60, strides=False))
    count = data.draw(counts_of(tensors))
    specs, size, strided = specs_of(tensors), *cutting
    with going(route):
        selector = selecting(Pieces(tensors, size, strided).parts)
        taken = selector.take(specs, count)
        check(tensors, count, specs, taken, [gone_of(selector, s, t) for s, t in zip(specs, taken, strict=True)])
        assert taken == selecting(whole(tensors)).take(specs, count)


ASKED = (
    {"allocation": "global"},
    {"allocation": "uniform"},
    {"allocation": "lamp"},
    {"allocation": "global", "criterion": secateur.random(5)},
    {"allocation": "erk", "criterion": secateur.random(5)},
    {"allocation": "global", "max_sparsity": 0.8, "min_keep": 1},
)


def plan_of(tensors: Pool, request: Request) -> Plan:
    return make(specs_of(tensors), whole(tensors), request, matches)


def keep_of_pieces(plan: Plan, store: Pieces, spec: Spec) -> tuple[Tensor, Tensor]:
    """(flat indices, keep) of the pieces that one worker holds, each computed from the plan alone."""
    pieces = [p for p in store.parts(spec, "chunk") if p.tensor.numel()]
    none = torch.zeros(0)
    index = torch.cat([none.long(), *(p.index().reshape(-1) for p in pieces)])
    return index, torch.cat([none.bool(), *(keep_mask(plan, p).reshape(-1) for p in pieces)])


@pytest.mark.parametrize("asked", ASKED, ids=str)
@settings(max_examples=8)
@given(st.data(), cuttings(), st.sampled_from([0.0, 0.3, 0.5, 0.77]))
def test_two_workers_make_the_same_plan(
    asked: dict[str, object], data: st.DataObject, cutting: tuple[int, bool], sparsity: float
) -> None:
    """Each sees its pieces only; counts are added up. Their parts of the mask make up the mask."""
    tensors = data.draw(pools(most=60, strides=False))
    tensors["t5"] = torch.ones(10)  # which leaves room under the caps
    request = Request.of(sparsity if sum(t.numel() for t in tensors.values()) > 40 else 0.5, **asked)
    one = plan_of(tensors, request)
    stores = [Pieces(tensors, *cutting, worker=w, workers=2) for w in range(2)]

    def job(worker: int, reduce: Reduce) -> Plan:
        return make(specs_of(tensors), stores[worker].parts, request, matches, reduce)

    assert Exchange(2).run(job) == [one, one]
    for spec in specs_of(tensors):
        keep = keep_mask(one, Part(spec, tensors[spec.name])).reshape(-1)
        assert int((~keep).sum()) == next(r.prune for r in one.rows if r.name == spec.name)
        found = [keep_of_pieces(one, store, spec) for store in stores]
        assert torch.equal(torch.cat([i for i, _ in found]).sort().values, torch.arange(spec.numel))
        for index, part in found:
            assert torch.equal(part, keep[index])


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.75])
def test_two_workers_that_hold_whole_tensors(asked: dict[str, object], sparsity: float) -> None:
    """As a file for each worker: one holds all of a tensor, the other nothing of it."""
    tensors = {f"t{i}": example((50 + 11 * i,), torch.float32, seed=i) for i in range(4)}
    request = Request.of(sparsity, **asked)
    one = plan_of(tensors, request)

    def job(worker: int, reduce: Reduce) -> Plan:
        def parts(spec: Spec, align: str) -> list[Part]:
            return [Part(spec, tensors[spec.name])] if int(spec.name[1:]) % 2 == worker else []

        return make(specs_of(tensors), parts, request, matches, reduce)

    assert Exchange(2).run(job) == [one, one]


@routes
@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@settings(max_examples=20)
@given(st.data(), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_the_mask_of_the_plan_is_the_mask_applied(route: tuple[str, int], data: st.DataObject, sparsity: float) -> None:
    tensors = {k: t for k, t in data.draw(pools()).items() if t.numel()} or {"t": torch.ones(3)}
    before = {k: t.clone() for k, t in tensors.items()}
    with going(route):
        plan = secateur.plan(tensors, sparsity, include=list(tensors))
        keep = {r.name: keep_mask(plan, Part(r.spec, tensors[r.name])) for r in plan.chosen}
        report = secateur.apply(plan, tensors)
    n = sum(t.numel() for t in tensors.values())
    expected = oracles.smallest(before, half_even(n, sparsity))
    for row in report:
        w, was = oracles.values(tensors[row.name]), oracles.values(before[row.name])
        np.testing.assert_array_equal(w == 0, expected[row.name])
        np.testing.assert_array_equal(w, np.where(expected[row.name], 0.0, was))
        assert not np.signbit(w[w == 0]).any(), "zeros are written as +0.0"
        np.testing.assert_array_equal(keep[row.name].reshape(-1).numpy(), ~expected[row.name])
        assert row.zeros == int((w == 0).sum())


def half_even(n: int, sparsity: float) -> int:
    """``round(sparsity * n)``, half to even, of tenths."""
    tenths = round(sparsity * 10) * n
    whole, rest = divmod(tenths, 10)
    return whole + (rest > 5 or (rest == 5 and whole % 2 == 1))
