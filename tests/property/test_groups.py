"""N:M against a brute force over every group: any N and M, dim, dtype, ties, zeros, pieces and route."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.choose import Taken
from secateur.core.types import Spec
from secateur.errors import Infeasible

from . import oracles
from .worlds import DTYPES, FILLS, Pieces, example, going, gone_of, routes, selecting, whole

RATIOS = [(1, 4), (2, 4), (3, 4), (1, 2), (4, 8), (2, 8), (5, 7), (1, 16)]


@dataclass(frozen=True)
class Layout:
    """A kind of weight: where its outputs, inputs and stacked layers lie, and its other sizes."""

    role: str
    out_dim: int
    in_dim: int
    others: tuple[int, ...]
    batch_dims: tuple[int, ...] = ()

    def spec(self, inputs: int, dtype: torch.dtype, name: str = "w") -> Spec:
        shape = list(self.others)
        shape.insert(self.in_dim, inputs)
        return Spec(name, tuple(shape), dtype, self.role, self.out_dim, self.in_dim, self.batch_dims)


LAYOUTS = [
    Layout("linear", 0, 1, (3,)),
    Layout("linear_transposed", 1, 0, (3,)),
    Layout("conv", 0, 1, (2, 3, 2)),
    Layout("conv_transpose", 1, 0, (2, 2, 3)),
    Layout("experts", 1, 2, (2, 3), (0,)),
    Layout("experts_transposed", 2, 1, (2, 3), (0,)),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: v.role)
ratios = pytest.mark.parametrize(("keep", "of"), RATIOS, ids=lambda v: str(v))


def check(t: Tensor, spec: Spec, keep: int, of: int, gone: Tensor, taken: Taken) -> None:
    """Against the brute force, and against what the words say of every group."""
    assert spec.in_dim is not None
    expected = oracles.nm(t, spec.in_dim, keep, of)
    np.testing.assert_array_equal(gone.numpy(), expected)
    w = oracles.values(t)
    assert (taken.pruned, taken.zeros) == (int(expected.sum()), int((w == 0).sum()))
    assert taken.threshold == oracles.smallest_survivor(t, expected)
    for group in oracles.groups(t.shape, spec.in_dim, of):
        live = int((w[group] != 0).sum())
        assert int((~gone[group]).sum()) == min(keep, live)


@routes
@layouts
@ratios
def test_every_group(route: tuple[str, int], layout: Layout, keep: int, of: int) -> None:
    with going(route):
        for fill in FILLS:
            for dtype in (torch.float32, torch.bfloat16):
                spec = layout.spec(2 * of, dtype)
                t = example(spec.shape, dtype, fill)
                selector = selecting(whole({"w": t}), secateur.NM(keep, of))
                (taken,) = selector.take([spec], spec.numel // of * (of - keep))
                check(t, spec, keep, of, gone_of(selector, spec, taken), taken)


@settings(max_examples=60)
@given(st.data())
def test_any_dtype_strides_and_pieces(data: st.DataObject) -> None:
    layout, dtype = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(DTYPES))
    of = data.draw(st.integers(2, 9))
    keep = data.draw(st.integers(1, of - 1))
    spec = layout.spec(of * data.draw(st.integers(1, 3)), dtype)
    t = example(spec.shape, dtype, data.draw(st.sampled_from(FILLS)), seed=data.draw(st.integers(0, 5)))
    pattern = secateur.NM(keep, of)
    run = pattern.grouping(spec).run
    pieces = Pieces({"w": t}, run * data.draw(st.integers(1, 3)), data.draw(st.booleans()), runs=run)
    count = spec.numel // of * (of - keep)
    parts = {
        "as it is": whole({"w": t}),
        "strided": whole({"w": t.transpose(0, -1).contiguous().transpose(0, -1)}),
        "in pieces": pieces.parts,
    }
    found = {}
    for how, source in parts.items():
        selector = selecting(source, pattern)
        (found[how],) = selector.take([spec], count)
        check(t, spec, keep, of, gone_of(selector, spec, found[how]), found[how])
    assert len(set(found.values())) == 1


MODULES = {
    "linear": (lambda: torch.nn.Linear(8, 5, bias=False), 1),
    "conv2d": (lambda: torch.nn.Conv2d(8, 3, (3, 2), bias=False), 1),
    "grouped conv": (lambda: torch.nn.Conv2d(16, 4, 3, groups=2, bias=False), 1),
    "conv transpose": (lambda: torch.nn.ConvTranspose2d(8, 3, 2, bias=False), 0),
}


@pytest.mark.parametrize("kind", MODULES)
@routes
def test_modules_are_written_along_their_inputs(route: tuple[str, int], kind: str) -> None:
    make, in_dim = MODULES[kind]
    module = make()
    w = module.weight.detach().clone()
    with going(route):
        report = secateur.prune(module, pattern="2:4")
    gone = oracles.nm(w, in_dim, 2, 4)
    np.testing.assert_array_equal(oracles.values(module.weight), np.where(gone, 0, oracles.values(w)))
    assert report.sparsity == 0.5
    assert secateur.prune(module, pattern="2:4").zeros == report.zeros


@settings(max_examples=40)
@given(st.data())
def test_other_scores_rank_inside_the_group(data: st.DataObject) -> None:
    """Signed scores, zeros first: the brute force by score, with weights that are zero below all."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    spec = layout.spec(8, torch.float32)
    t = example(spec.shape, torch.float32, data.draw(st.sampled_from(["normal", "sparse"])))
    score = torch.tensor(
        data.draw(st.lists(st.integers(-3, 3), min_size=t.numel(), max_size=t.numel())), dtype=torch.float32
    ).view(t.shape)
    selector = selecting(whole({"w": t}), secateur.NM(2, 4), criterion=lambda weight: score)
    (taken,) = selector.take([spec], spec.numel // 2)
    gone, w, s = gone_of(selector, spec, taken).numpy(), oracles.values(t), oracles.values(score)
    for group in oracles.groups(t.shape, layout.in_dim, 4):
        order = sorted(group, key=lambda i: (w[i] != 0, s[i], i))
        assert [bool(gone[i]) for i in order] == [k < 2 or w[i] == 0 for k, i in enumerate(order)]


@routes
def test_nonfinite_weights_in_groups(route: tuple[str, int]) -> None:
    """Kept ones rank last; a group that holds more of them than it may keep is refused; pruned ones rank first."""
    w = torch.tensor([[torch.nan, 1.0, 2.0, 3.0, torch.inf, -torch.nan, 0.5, 4.0]])
    with going(route):
        kept, dropped = w.clone(), w.clone()
        secateur.prune(kept, pattern="2:4", nonfinite="keep")
        secateur.prune(dropped, pattern="2:4", nonfinite="prune")
        with pytest.raises(Infeasible):
            secateur.prune(w, pattern="1:4", nonfinite="keep")
    assert (kept != 0).tolist() == [[True, False, False, True, True, True, False, False]]
    assert dropped.tolist() == [[0, 0, 2, 3, 0, 0, 0.5, 4]]
    assert bool(torch.isnan(w[0, 0]))
