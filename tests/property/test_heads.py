"""Heads against a brute force in exact fractions: layers of any make, one after another in one long vector."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.heads import Head, joined
from secateur.core.types import Reduce, Spec
from secateur.stores.memory import MemoryStore

from . import oracles
from .worlds import Exchange, Pieces, example, selecting, whole

NAMES = {
    "apart": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    "packed": ("in_proj_weight", "out_proj.weight"),
    "transposed": ("c_attn.weight", "c_proj.weight"),
    "head by head": ("query_key_value.weight", "dense.weight"),
}


@dataclass(frozen=True)
class Layer:
    """A layer of attention: ``groups`` of ``shared`` heads of ``size`` features, on ``width`` inputs."""

    kind: str
    groups: int
    shared: int
    size: int
    width: int

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[self.kind]

    def owners(self) -> dict[str, Tensor]:
        """Which group of heads each element belongs to: of every tensor, in its shape."""
        groups = torch.arange(self.groups)
        own = groups.repeat_interleave(self.size)
        q, o = (groups.repeat_interleave(self.size * self.shared) for _ in range(2))
        packed = torch.cat([q, own, own])
        mixed = groups.repeat_interleave(self.size * (self.shared + 2))
        rows = {"apart": [q, own, own], "packed": [packed], "transposed": [packed], "head by head": [mixed]}[self.kind]
        found = [r[:, None].expand(len(r), self.width) for r in rows] + [o[None].expand(self.width, len(o))]
        if self.kind == "transposed":
            found = [t.t() for t in found]
        return {n: t.contiguous() for n, t in zip(self.names, found, strict=True)}


@st.composite
def networks(draw: st.DrawFn, heads: int) -> dict[str, Layer]:
    """Up to three layers with so many heads each."""
    layers = {}
    for i in range(draw(st.integers(1, 3))):
        shared = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
        kind = draw(st.sampled_from(list(NAMES)))
        width = draw(st.integers(1, 3)) * (7 if kind == "transposed" else 1)  # not square, so that the bias tells
        layers[f"{draw(st.sampled_from('xyz'))}{i}"] = Layer(
            kind, heads // shared, shared, draw(st.integers(1, 3)), width
        )
    return layers


def draw_tensors(data: st.DataObject, layers: dict[str, Layer]) -> dict[str, Tensor]:
    """Small whole numbers (so that heads tie, and whole heads are zero) or normals, of mixed dtypes."""
    out = {}
    for path, layer in layers.items():
        for name, owner in layer.owners().items():
            dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]))
            if data.draw(st.booleans()):
                out[f"{path}.{name}"] = example(owner.shape, dtype, data.draw(st.sampled_from(["normal", "sparse"])))
            else:
                drawn = data.draw(
                    st.lists(st.sampled_from([0, 0, 1, -2, 3]), min_size=owner.numel(), max_size=owner.numel())
                )
                out[f"{path}.{name}"] = torch.tensor(drawn, dtype=torch.float64).view(owner.shape).to(dtype)
        if layer.kind == "transposed":
            out[f"{path}.c_attn.bias"] = torch.ones(layer.owners()["c_attn.weight"].shape[1])
    return out


def expected(tensors: dict[str, Tensor], layers: dict[str, Layer], count: int, reduce: str) -> dict[str, list[int]]:
    """The groups of heads that go, by layer: by one long vector a layer, and its units as lists of places."""
    order = sorted(layers, key=lambda path: min(f"{path}.{n}" for n in layers[path].names))
    long = {p: torch.cat([tensors[f"{p}.{n}"].double().reshape(-1) for n in layers[p].names]) for p in order}
    listed = []
    for path in order:
        owner = torch.cat([t.reshape(-1) for t in layers[path].owners().values()])
        listed += [(path, (owner == g).nonzero().reshape(-1).tolist()) for g in range(layers[path].groups)]
    starts = {path: [p for p, _ in listed].index(path) for path in order}
    went = oracles.smallest_units(long, listed, count, reduce)
    return {path: [i - starts[path] for i in sorted(went) if listed[i][0] == path] for path in order}


def pools(tensors: dict[str, Tensor], pattern: Head) -> list[Spec]:
    return joined([s for s in MemoryStore(tensors).specs() if s.attention is not None], pattern)


@pytest.mark.parametrize("reduce", ["mean", "l1", "l2", "max"])
@settings(max_examples=8)
@given(st.data())
def test_pooled_and_alone(reduce: Any, data: st.DataObject) -> None:
    """All layers as one pool, and each on its own, from whole tensors and from pieces, of one worker and of two."""
    pattern = Head(data.draw(st.sampled_from([1, 2, 4])), reduce)
    layers = data.draw(networks(pattern.n))
    tensors = draw_tensors(data, layers)
    specs = pools(tensors, pattern)
    assert [s.name for s in specs] == list(expected(tensors, layers, 0, reduce))
    count = data.draw(st.integers(0, sum(s.numel for s in specs)))
    must = expected(tensors, layers, count, reduce)
    size = data.draw(st.sampled_from([3, 7, 11]))
    for parts in (whole(tensors), Pieces(tensors, size, data.draw(st.booleans())).parts):
        selector = selecting(parts, pattern)
        taken = selector.take(specs, count)
        assert {s.name: list(t.units or ()) for s, t in zip(specs, taken, strict=True)} == must
        for spec, own in zip(specs, taken, strict=True):
            for member, counted in zip(spec.members, own.members, strict=True):
                owner = layers[spec.name].owners()[member.name.removeprefix(f"{spec.name}.")]
                dead = tensors[member.name].double() == 0
                zero = torch.isin(owner, torch.tensor(must[spec.name], dtype=torch.int64)) | dead
                assert (counted.pruned, counted.zeros) == (int(zero.sum()), int(dead.sum()))
    for spec in specs:
        some = min(count, spec.numel)
        (alone,) = selecting(whole(tensors), pattern).take([spec], some)
        assert list(alone.units or ()) == expected(tensors, {spec.name: layers[spec.name]}, some, reduce)[spec.name]
    if reduce != "max":  # whose table needs whole units with one worker

        def job(worker: int, add: Reduce) -> object:
            parts = Pieces(tensors, size, worker=worker, workers=2).parts
            return [t.units for t in selecting(parts, pattern, reduce=add).take(specs, count)]

        assert Exchange(2).run(job) == [[tuple(u) for u in must.values()]] * 2


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@settings(max_examples=15)
@given(st.data(), st.sampled_from(["global", "uniform", "erk"]))
def test_twice_is_once_and_sparser_is_inside(data: st.DataObject, allocation: str) -> None:
    pattern = Head(data.draw(st.sampled_from([2, 4])))
    layers = data.draw(networks(pattern.n))
    tensors = draw_tensors(data, layers)
    low, high = sorted(data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    zeros = []
    for s in (low / 10, high / 10):
        copy = {n: t.clone() for n, t in tensors.items()}
        secateur.prune(copy, s, pattern=pattern, allocation=allocation)
        once = {n: t.double() == 0 for n, t in copy.items()}
        secateur.prune(copy, s, pattern=pattern, allocation=allocation)
        assert all(torch.equal(t.double() == 0, once[n]) for n, t in copy.items())
        zeros.append(once)
    assert all(bool((zeros[0][n] <= zeros[1][n]).all()) for n in tensors)
    chosen = list(chain.from_iterable((f"{p}.{n}" for n in layer.names) for p, layer in layers.items()))
    assert all(torch.equal(copy[n], tensors[n]) for n in set(tensors) - set(chosen) if "bias" not in n)
