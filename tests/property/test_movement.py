"""The masks of movement pruning against a stable sort: exact counts, ties, zeros first, in every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur import Pruner, dynamic, schedules
from secateur.core.allocate import prune_count

pytestmark = pytest.mark.filterwarnings("ignore:at step 1. (left with nothing|no gradient)")
SHAPES = {"0.weight": (4, 3), "1.weight": (5, 4), "2.weight": (2, 5)}
VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
SCORES = st.sampled_from([-1e30, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 2.0, 1e30])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def model_of(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in SHAPES.values())).to(dtype)


def tensors(draw: st.DrawFn, values: st.SearchStrategy[float]) -> dict[str, Tensor]:
    sizes = {n: a * b for n, (a, b) in SHAPES.items()}
    return {n: torch.tensor(draw(st.lists(values, min_size=k, max_size=k))).view(SHAPES[n]) for n, k in sizes.items()}


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """All weights, which of them live now, and scores; with ties and zeros everywhere."""
    live = {n: t > 0 for n, t in tensors(draw, st.sampled_from([0.0, 1.0])).items()}
    return tensors(draw, VALUES), live, tensors(draw, SCORES)


def sorted_masks(
    weights: dict[str, Tensor], scores: dict[str, Tensor], share: float, uniform: bool
) -> dict[str, Tensor]:
    """By a stable sort of (not zero, score), tensors in the order of their names; never fewer than there are zeros."""
    found = {}
    for names in [[n] for n in weights] if uniform else [list(weights)]:
        keys = [
            (bool(w != 0), float(s))
            for n in names
            for w, s in zip(weights[n].view(-1), scores[n].view(-1), strict=True)
        ]
        count = max(prune_count(len(keys), share), sum(not alive for alive, _ in keys))
        gone = set(sorted(range(len(keys)), key=keys.__getitem__)[:count])
        keep = torch.tensor([i not in gone for i in range(len(keys))])
        for n, part in zip(names, keep.split([weights[n].numel() for n in names]), strict=True):
            found[n] = part.view(SHAPES[n])
    return found


@settings(max_examples=80)
@given(states(), st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.97]), st.booleans(), st.sampled_from(DTYPES))
def test_what_lives_is_what_the_sort_says(
    state: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    share: float,
    uniform: bool,
    dtype: torch.dtype,
) -> None:
    weights, live, scores = state
    weights = {n: w.to(dtype) for n, w in weights.items()}
    model = model_of(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    pruner = Pruner(
        model, optimizer, lambda step: share if step else 0.0, rewire=dynamic.movement(every=1, end=9),
        allocation="uniform" if uniform else "global",
    )  # fmt: skip
    saved = pruner.state_dict()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.where(live[n], weights[n], 0))
    remembered = {n: torch.where(live[n], 0, w) for n, w in weights.items()}
    pruner._held.bits = pruner._held.checked(live, None)
    masks = pruner.state_dict()["masks"]
    pruner.load_state_dict(
        {**saved, "held": sorted(masks), "masks": masks, "movement": {"scores": scores, "values": remembered}}
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    # Where nothing is pruned before or after, there is nothing to do: zeros that live are left alone.
    wanted = sorted_masks(weights, scores, share, uniform) if share else live
    assert {n: m.tolist() for n, m in pruner.masks().items()} == {n: m.tolist() for n, m in wanted.items()}
    now = pruner.state_dict()["movement"]["values"]
    for n, p in model.named_parameters():
        assert torch.equal(p, torch.where(wanted[n], weights[n], 0)) and not torch.signbit(p[~wanted[n]]).any()
        assert torch.equal(now[n], torch.where(wanted[n], 0, weights[n]))
        assert p.dtype == now[n].dtype == dtype


@settings(max_examples=60)
@given(states(), st.floats(0.01, 0.49))
def test_soft_keeps_what_passes_and_is_not_zero(
    state: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], threshold: float
) -> None:
    weights, _, _ = state
    model = model_of(torch.float32)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(weights[n])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    how = dynamic.soft_movement(schedules.constant(threshold), lr=1.0, strength=0.0, every=1, end=9)
    pruner = Pruner(model, optimizer, rewire=how)
    gradients = {n: w.flip(0) for n, w in weights.items()}
    for n, p in model.named_parameters():
        p.grad = gradients[n].clone()
    optimizer.step()
    for n, mask in pruner.masks().items():
        passes = (-(gradients[n] * weights[n])).double().sigmoid() > threshold
        assert torch.equal(mask, passes & (weights[n] != 0))
