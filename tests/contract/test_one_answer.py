"""Promise 2: the same mask from every store that holds the same tensors under the same names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import secateur
from tests.contract.disk import load, save_one, save_shards
from tests.contract.nets import CHOSEN, Kind, bits, net, tensors
from tests.contract.table import DTYPES, PATTERNS, PLAIN, Case, default_of, expected_warnings, ids, in_turn

State = dict[str, Tensor]


def pruned(target: Any, case: Case, **more: Any) -> secateur.Report:
    with expected_warnings():
        return secateur.prune(target, **(case.asked() | more))


def same(got: State, want: State) -> None:
    assert {n: bits(got[n]) for n in want} == {n: bits(t) for n, t in want.items()}


def facts(report: secateur.Report) -> list[tuple[Any, ...]]:
    """What reports of one model from several stores have in common."""
    return [(r.name, r.shape, r.dtype, r.role, r.zeros, r.threshold, r.asked) for r in report.chosen]


ORDERED = "uniform_plus"
"""The allocation that asks for the order of the layers, which only a module and its ``state_dict()`` know."""


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_module_dict_wrappers_and_files_agree(case: Case, tmp_path: Path) -> None:
    both: list[tuple[str, Kind]] = [("float32", "plain"), ("mixed", "ties")]
    for dtype, kind in in_turn(case, both):
        model = net(dtype, kind)
        dense = tensors(model)
        seen = pruned(model, case)
        want = tensors(model)

        copied = {n: t.clone() for n, t in dense.items()}
        as_dict: State = net(dtype, kind).state_dict() if case.allocation == ORDERED else copied
        assert facts(pruned(as_dict, case)) == facts(seen)
        same(as_dict, want)

        wrapped = torch.compile(AveragedModel(net(dtype, kind)), backend="eager")
        assert facts(pruned(wrapped, case)) == facts(seen)
        same(tensors(wrapped.module), want)

        folder = tmp_path / dtype
        for source in (save_one(dense, save_shards(dense, folder / "shards").parent), folder / "shards"):
            out = folder / "out" if source.is_dir() else folder / "out.safetensors"
            if case.allocation == ORDERED:
                with pytest.raises(secateur.BadInput, match="needs the order of the layers"):
                    pruned(source, case, out=out)
                assert not out.exists()
            else:
                assert facts(pruned(source, case, out=out)) == facts(seen)
                same(load(out), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_dtype_comes_back_from_every_store(pattern: str, dtype: str, tmp_path: Path) -> None:
    case = Case(pattern, default_of(pattern), "random")
    model = net(dtype, "ties")
    dense = tensors(model)
    pruned(model, case)
    as_dict = {n: t.clone() for n, t in dense.items()}
    pruned(as_dict, case)
    same(as_dict, tensors(model))
    pruned(save_shards(dense, tmp_path / "in"), case, out=tmp_path / "out")
    same(load(tmp_path / "out"), tensors(model))


class Holder(nn.Module):
    """A wrapper as those of sharded and checkpointed training: one child under a name of its own."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


def prefixed(prefix: str) -> Callable[[nn.Module], State]:
    return lambda m: {prefix + n: t for n, t in m.state_dict().items()}


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "averaged": AveragedModel,
    "data parallel": nn.DataParallel,
    "compile of data parallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "fsdp": lambda m: Holder("_fsdp_wrapped_module", m),
    "activation checkpoint": lambda m: Holder("_checkpoint_wrapped_module", m),
    "dict of data parallel": prefixed("module."),
    "dict of compile": prefixed("_orig_mod."),
    "dict of all": prefixed("module._orig_mod._fsdp_wrapped_module."),
    "dict of averaged": lambda m: AveragedModel(m).state_dict(),
    "dict in another order": lambda m: dict(reversed(m.state_dict().items())),
    "named parameters": lambda m: dict(m.named_parameters()),
}


BY_NAME = [c for c in PLAIN if c.criterion == "random" and c.allocation in ("global", "mapping", "uniform_plus")]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", BY_NAME, ids=ids(BY_NAME))
def test_wrappers_and_the_order_of_a_dict_change_nothing(case: Case, wrapper: str) -> None:
    plain = net("bfloat16", "ties")
    want = facts(pruned(plain, case))
    wrapped = WRAPPERS[wrapper](net("bfloat16", "ties"))
    if case.allocation == ORDERED and type(wrapped) is dict:
        with pytest.raises(secateur.BadInput, match="needs the order of the layers"):
            pruned(wrapped, case)
        return
    assert facts(pruned(wrapped, case)) == want
    tensors_of = wrapped.state_dict() if isinstance(wrapped, nn.Module) else wrapped
    found = {n[n.index(c) :]: t for n, t in tensors_of.items() for c in CHOSEN if n.endswith(c)}
    same(found, {n: plain.get_parameter(n) for n in CHOSEN})


@pytest.mark.parametrize("case", [c for c in PLAIN if c.allocation in ("global", "lamp", "erk")], ids=str)
def test_threads_change_nothing(case: Case) -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = net("bfloat16", "ties")
        found.append((facts(pruned(model, case)), tensors(model)))
    assert found[0][0] == found[1][0]
    same(found[0][1], found[1][1])


@pytest.mark.parametrize("case", [c for c in PLAIN if c.allocation == "global"], ids=str)
def test_one_tensor_is_a_model_of_one(case: Case) -> None:
    for name in CHOSEN:
        alone = net().get_parameter(name).detach().clone()
        named = {"tensor.weight": alone.clone()}
        report = pruned(alone, case)
        pruned(named, case)
        assert report.total == alone.numel()
        if case.criterion != "random":  # the name is part of that order
            same({"w": alone}, {"w": named["tensor.weight"]})


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_a_plan_made_anywhere_can_be_carried_out_everywhere(case: Case, tmp_path: Path) -> None:
    """The plan, its JSON and its masks on disk all stand for what `prune` does."""
    model = net("bfloat16", "ties")
    dense = tensors(model)
    with expected_warnings():
        plan = secateur.plan(model, **case.asked())
    same(tensors(model), dense)  # planning touches nothing
    secateur.save_plan(plan, tmp_path / "plan.json")
    loaded = secateur.load_plan(tmp_path / "plan.json")
    assert loaded == plan
    want = net("bfloat16", "ties")
    report = pruned(want, case)
    assert (plan.prune, plan.total) == (report.zeros, report.total)
    as_dict = {n: t.clone() for n, t in dense.items()}
    with expected_warnings():
        secateur.apply(loaded, as_dict)
        assert facts(secateur.apply(plan, model)) == facts(report)
    same(as_dict, tensors(want))
    same(tensors(model), tensors(want))
    if case.allocation == "global":
        with expected_warnings():
            secateur.apply(loaded, save_shards(dense, tmp_path / "in"), out=tmp_path / "out")
        same(load(tmp_path / "out"), tensors(want))


@pytest.mark.parametrize("case", [c for c in PLAIN if c.allocation == "global"], ids=str)
def test_masks_are_the_plan_in_another_form(case: Case) -> None:
    model = net("bfloat16", "ties")
    dense = tensors(model)
    pruned(model, case)
    masks = secateur.masks(model)
    assert list(masks) == list(CHOSEN)
    again = {n: t.clone() for n, t in dense.items()}
    report = secateur.apply(masks, again)
    assert report.zeros == sum(int((~m).sum()) for m in masks.values())
    want = tensors(model)
    for n, t in again.items():
        if n in CHOSEN or case.pattern != "channel":  # no mask speaks of the biases of channels
            assert torch.equal(t.double(), want[n].double())  # as numbers: -0.0 in a unit that stays is left as it is


@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides_change_nothing(pattern: str) -> None:
    """Channels-last and transposed weights are pruned where they lie."""
    case = Case(pattern, default_of(pattern), "magnitude")
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        plain, strided = net(dtype, "ties"), net(dtype, "ties")
        strided.conv.weight.data = strided.conv.weight.data.view(8, 4, 3, 1).transpose(2, 3)
        strided.fc1.weight.data = strided.fc1.weight.data.t().contiguous().t()
        assert not strided.fc1.weight.is_contiguous()
        strides = [p.stride() for p in strided.parameters()]
        assert facts(pruned(strided, case)) == facts(pruned(plain, case))
        same(tensors(strided), tensors(plain))
        assert [p.stride() for p in strided.parameters()] == strides


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("case", [c for c in PLAIN if c.criterion in ("magnitude", "random")], ids=str)
def test_a_gpu_gives_the_same_mask(case: Case) -> None:
    here, there = net("bfloat16", "ties"), net("bfloat16", "ties").cuda()
    assert facts(pruned(there, case)) == facts(pruned(here, case))
    same({n: t.cpu() for n, t in there.state_dict().items()}, tensors(here))
