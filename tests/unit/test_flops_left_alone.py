"""What counting FLOPs leaves alone, how shared modules are told apart, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from secateur.errors import BadInput
from secateur.evaluate.flops import Flops, count_flops

from .test_flops import Calls


def test_a_shared_module_counts_each_time() -> None:
    fc = nn.Linear(4, 4)
    assert count_flops(nn.Sequential(fc, nn.ReLU(), fc), torch.randn(1, 4)) == Flops(64, {"0": 64}, 64)


def test_a_shared_module_whose_weight_is_used_from_outside() -> None:
    fc = nn.Linear(4, 4)
    model = Calls(lambda x, b: F.linear(x, b.weight), b=fc)
    model.a = fc  # sorts before the name that comes first
    assert count_flops(model, torch.randn(1, 4)) == Flops(32, {"b": 32}, 32)


def test_tied_weights_go_to_the_module_that_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_flops(model, torch.randn(1, 4)).by_module == {"0": 32, "1": 32}


def global_hooks() -> int:
    return len(nn_module._global_forward_hooks) + len(nn_module._global_forward_pre_hooks)


def test_flags_and_hooks_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[2].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags, hooks = [m.training for m in model.modules()], global_hooks()
    random = torch.get_rng_state()
    count_flops(model, torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == flags == [True, True, True, False]
    with pytest.raises(RuntimeError, match="shapes"):
        count_flops(model, torch.zeros(4, 5))
    assert [m.training for m in model.modules()] == flags
    assert global_hooks() == hooks
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_train_is_not_called() -> None:
    class Merges(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("merging cannot be undone")

    count_flops(Merges(4, 4), torch.zeros(1, 4))


def test_an_error_in_a_module_leaves_the_next_count_right() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        count_flops(model, torch.zeros(1, 4))
    handle.remove()
    assert count_flops(model, torch.zeros(1, 4)).by_module == {"0": 32}


def test_caught_errors_do_not_confuse_the_books() -> None:
    def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        try:
            first(x[:, :1])
        except RuntimeError:
            return second(first(x)) @ x.t()
        raise AssertionError

    model = Calls(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    assert count_flops(model, torch.zeros(1, 4)).by_module == {"": 8, "first": 32, "second": 32}


def test_a_module_that_never_ran_is_named() -> None:
    model = Calls(lambda x, a, b: a(x), used=nn.Linear(4, 4), unused=nn.Conv2d(1, 1, 3))
    with pytest.raises(BadInput, match=r"1 module .*'unused' \(Conv2d\): was never called"):
        count_flops(model, torch.zeros(1, 4))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(BadInput, match="the model itself"):
        count_flops(nn.Linear(4, 4), torch.zeros(0, 4))


def test_an_operator_that_is_not_counted_is_named() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] * self.weight).sum(-1)

    with pytest.raises(BadInput, match=r"'0' \(Odd\): ran, but by an operator that is not counted"):
        count_flops(nn.Sequential(Odd(4, 4)), torch.zeros(1, 4))


def test_one_of_two_expert_weights_is_enough_to_refuse() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(2, 4, 4))
            self.down_proj = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.bmm(x, self.up_proj)[..., None] * self.down_proj[:, None]).sum(-2)

    model = Calls(lambda x, experts: experts(x), experts=Experts())
    with pytest.raises(BadInput, match=r"1 module .*'experts' \(Experts\): ran, but"):
        count_flops(model, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("bad", [[torch.zeros(1, 4)], None, 4])
def test_bad_example_input(bad: Any) -> None:
    with pytest.raises(BadInput, match="example_input is a"):
        count_flops(nn.Linear(4, 4), bad)


def test_weights_without_values() -> None:
    with pytest.raises(BadInput, match="'weight' is on the meta device"):
        count_flops(nn.Linear(4, 4, device="meta"), torch.zeros(1, 4))
    with pytest.raises(BadInput, match="'weight' belongs to a lazy module"):
        count_flops(nn.LazyLinear(4), torch.zeros(1, 4))
