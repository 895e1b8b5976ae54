"""What one of several processes does: prunes models that are cut in many ways, and compares with the whole model alone.

``python -m tests.contract.sharded_run RANK WORLD FOLDER ONE_IN [CHOSEN]``; rank 0 leaves what went wrong, by case, in the folder.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

import secateur
from secateur.core.criteria import is_elementwise
from secateur.core.spelling import criterion_of
from tests.contract import sharded_training
from tests.contract.nets import net, snapshot
from tests.contract.processes import join, run_all
from tests.contract.sharded import (
    Odd,
    Tied,
    both,
    everywhere,
    facts,
    failure,
    fsdp,
    hybrid,
    layers,
    local,
    replicated,
    same_values,
    several_meshes,
    tensor_parallel,
    the_same_as_alone,
    whole_mesh,
)
from tests.contract.table import CRITERIA, DTYPES, PLAIN

CUTS = {
    2: {"fsdp": fsdp, "layers": layers, "tensor parallel": tensor_parallel, "replicated": replicated},
    4: {"fsdp and tensor parallel": both, "hybrid": hybrid, "several meshes": several_meshes},
}
ELEMENTWISE = [c for c in PLAIN if is_elementwise(criterion_of(CRITERIA[c.criterion]))]
"""What is defined for DTensors: criteria that look at single weights."""
CUT_ROWS = {"tensor parallel", "replicated", "fsdp and tensor parallel", "several meshes"}
"""Ways in which a row of some layer lies in several processes."""


every = 1
"""Of the combinations one in so many is run; others with every way to cut."""


def few(of: int) -> int:
    """One in how many is run where not all are: four processes on two cores take their time."""
    return 1 if every == 1 else of * dist.get_world_size() // 2


def combinations(name: str) -> None:
    """Every combination of pattern, allocation and criterion."""
    cut = CUTS[dist.get_world_size()][name]
    for i, case in enumerate(ELEMENTWISE):
        if (i + [*CUTS[2], *CUTS[4]].index(name)) % few(every):
            continue
        dtype, kind = [("float32", "plain"), ("bfloat16", "ties"), ("float16", "plain"), ("mixed", "ties")][i % 4]
        make = partial(net, dtype, kind)  # type: ignore[arg-type]
        if case.pattern == "row" and name in CUT_ROWS:
            model = make()
            cut(model)
            refused = failure(lambda m=model, c=case: secateur.prune(m, **c.asked()))  # type: ignore[misc]
            assert isinstance(refused, secateur.errors.NotDefined), refused
            assert "lies in several processes" in str(refused)
        else:
            the_same_as_alone(make, cut, str(case), **case.asked())


def amounts(name: str) -> None:
    """Sparsities from none to nearly all, thresholds, caps, NaN that is kept or goes first, in every dtype."""
    cut = CUTS[dist.get_world_size()][name]
    asks: list[tuple[str, str, dict[str, Any]]] = [
        (dtype, "ties", {"sparsity": s}) for s in (0.3, 0.99, 0.0) for dtype in DTYPES
    ]
    asks += [("float32", "ties", asked) for asked in MORE]
    asks += [("float32", "bad", {"nonfinite": n, **p}) for n in ("keep", "prune") for p in PATTERNED]
    for dtype, kind, asked in asks[:: few(6)]:
        the_same_as_alone(partial(net, dtype, kind), cut, f"{dtype} {asked}", **asked)  # type: ignore[arg-type]


MORE: tuple[dict[str, Any], ...] = (
    {"threshold": 0.5},
    {"sparsity": 0.5, "max_sparsity": {"fc2": 0.25}, "min_keep": 40},
    {"sparsity": 0.5, "include": ["fc1.weight", "fc1.bias", "emb.weight"]},
    {"sparsity": 0.5, "pattern": "channel", "allocation": "uniform", "max_sparsity": 0.6},
)
PATTERNED: tuple[dict[str, Any], ...] = ({"sparsity": 0.4}, {"sparsity": 0.4, "pattern": "4x4"}, {"pattern": "2:4"})


def odd_shapes() -> None:
    """Rows that do not divide, fewer than there are processes, all weights equal."""

    def equal() -> nn.Module:
        model = Odd()
        for p in model.parameters():
            nn.init.constant_(p, 0.5)
        return model

    def drawn() -> nn.Module:
        torch.manual_seed(1)
        return Odd()

    hows = (
        ("unstructured", "global"), ("unstructured", "lamp"), ("unstructured", "erk"),
        ("channel", "global"), ("row", "uniform"), ("channel:in", "global"),
    )  # fmt: skip
    asks = [(make, s, how) for how in hows for s in (0.37, 0.8, 0.0) for make in (equal, drawn)]
    for make, sparsity, (pattern, allocation) in asks[:: few(5)]:
        asked: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "allocation": allocation}
        the_same_as_alone(make, fsdp, str(asked), **asked)


def heads() -> None:
    """Heads of attention, whose slices lie along both dims."""

    def make() -> nn.Module:
        torch.manual_seed(2)
        model = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            model.add_module(name, nn.Linear(8, 8))
        return model

    the_same_as_alone(make, fsdp, "heads", sparsity=0.5, pattern=secateur.Head(4))


def ties() -> None:
    """Tied weights are one, in a module and in its state_dict, also where a shard is empty."""
    alone, model = Tied(), Tied()
    model.load_state_dict(alone.state_dict())
    fsdp(model)
    want, got = secateur.prune(alone, 0.5), secateur.prune(model, 0.5)
    assert facts(got) == facts(want)
    same_values(model, dict(alone.named_parameters()))
    assert model.b.weight is model.a.weight
    assert facts(secateur.inspect(model.state_dict())) == facts(secateur.inspect(alone.state_dict()))
    state = model.state_dict()
    assert secateur.prune(state, 0.75).zeros == secateur.prune(alone.state_dict(), 0.75).zeros
    same_values(model, dict(alone.named_parameters()))


def plans_and_masks() -> None:
    """A plan, masks and counts go from one process to several and back."""
    alone, model = net("bfloat16", "ties"), net("bfloat16", "ties")
    fsdp(model)
    made = secateur.plan(alone, 0.6, allocation="uniform")
    assert secateur.plan(model, 0.6, allocation="uniform").to_json() == made.to_json()
    masks = secateur.masks(net("bfloat16", "plain"))
    assert {n: m.shape for n, m in secateur.masks(model).items()} == {n: m.shape for n, m in masks.items()}
    assert facts(secateur.apply(made, model)) == facts(secateur.apply(made, alone))
    same_values(model, dict(alone.named_parameters()))
    assert facts(secateur.inspect(model)) == facts(secateur.inspect(alone))
    cut = secateur.masks(model)
    assert all(isinstance(m, DTensor) for m in cut.values())
    other, whole, third = net("float32"), net("float32"), net("float32")
    layers(other)
    fsdp(third)
    for target, given in ((other, cut), (whole, secateur.masks(alone)), (third, secateur.masks(alone))):
        secateur.apply(given, target)
    for target in (other, third):
        same_values(target, dict(whole.named_parameters()))
    refused = failure(lambda: secateur.apply(secateur.plan(net("bfloat16"), 0.2), model))
    assert isinstance(refused, secateur.errors.PlanMismatch)


def after_a_forward_pass() -> None:
    """Whole copies that a forward pass leaves behind are not taken for the weights."""
    alone, model = Odd(), Odd()
    model.load_state_dict(alone.state_dict())
    fully = model
    fsdp(fully)
    with torch.no_grad():
        fully(torch.randn(4, 7))
    assert facts(secateur.prune(fully, 0.5)) == facts(secateur.prune(alone, 0.5))
    same_values(fully, dict(alone.named_parameters()))


def copies_that_differ() -> None:
    """Plain tensors are counted by rank 0, and the others take its mask over."""
    model = net()
    layers(model)
    if dist.get_rank():
        with torch.no_grad():
            model.get_parameter("fc1.weight").mul_(-1.5).roll(1)
    secateur.prune(model, 0.5)
    masks = everywhere([(local(p) != 0).tolist() for n, p in model.named_parameters() if n == "fc1.weight"])
    assert masks[0] == masks[1]


def strided_shards() -> None:
    """A shard whose memory is not in order."""
    alone, model = nn.Linear(8, 6), nn.Linear(8, 6)
    model.load_state_dict(alone.state_dict())
    w = model.weight.detach().chunk(dist.get_world_size())[dist.get_rank()].t().contiguous().t()
    model.weight = nn.Parameter(DTensor.from_local(w, whole_mesh(), [Shard(0)], run_check=False))
    assert facts(secateur.prune(model, 0.5)) == facts(secateur.prune(alone, 0.5))
    same_values(model, dict(alone.named_parameters()))


def same_everywhere(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    """Every process raises the same error."""
    error = failure(call)
    told = everywhere((type(error).__name__, str(error)))
    assert isinstance(error, kind), error
    assert text in str(error), error
    assert all(t == told[0] for t in told), told


def bad_values() -> None:
    """NaN in the last process's shard is refused by all, and nothing is touched."""
    for pattern in ("unstructured", "channel", "4x4"):
        model = net()
        model.fc1.weight.data[-1, -1] = math.nan
        fsdp(model)
        before = {n: snapshot({"": local(p)}) for n, p in model.named_parameters()}
        same_everywhere(
            lambda m=model, p=pattern: secateur.prune(m, 0.5, pattern=p),  # type: ignore[misc]
            secateur.errors.BadTensor, "'fc1.weight' (shape (32, 8), float32) holds 1 NaN or infinite weight",
        )  # fmt: skip
        assert before == {n: snapshot({"": local(p)}) for n, p in model.named_parameters()}


def errors_of_one() -> None:
    """What one process alone runs into, all raise."""
    last = dist.get_rank() == dist.get_world_size() - 1

    @secateur.elementwise
    def fails(weight: Tensor) -> Tensor:
        if last:
            raise ZeroDivisionError("not here")
        return weight.abs()

    @secateur.elementwise
    def nan(weight: Tensor) -> Tensor:
        return weight * math.nan if last else weight.abs()

    for criterion, kind, text in (
        (nan, secateur.errors.BadTensor, "NaN"), (fails, Exception, "not here"),
    ):  # fmt: skip
        for pattern in ("unstructured", "channel"):
            model = net()
            fsdp(model)
            error = failure(lambda m=model, c=criterion, p=pattern: secateur.prune(m, 0.5, criterion=c, pattern=p))  # type: ignore[misc]
            assert isinstance(error, kind), error
            assert text in str(error), error
    model = net()
    fsdp(model)
    same_everywhere(
        lambda: secateur.prune(model, 0.5 if last else 0.25),
        secateur.BadInput,
        "must prune the same model in the same way",
    )
    assert secateur.prune(model, 0.5).zeros == 240


def refusals() -> None:
    """What is not defined for DTensors, with the reason."""
    model = net()
    fsdp(model)
    before = {n: snapshot({"": local(p)}) for n, p in model.named_parameters()}
    for asked, text in (
        ({"criterion": lambda weight: weight.abs()}, "looks at whole tensors"),
        ({"pattern": secateur.Channel("out", "max")}, "maxima do not add up"),
        ({"calibration": [torch.ones(1)], "criterion": "wanda"}, ""),
    ):
        same_everywhere(lambda a=asked: secateur.prune(model, 0.5, **a), secateur.BadInput, text)  # type: ignore[misc]
    assert before == {n: snapshot({"": local(p)}) for n, p in model.named_parameters()}
    partial_sums = {"fc.weight": DTensor.from_local(torch.ones(4, 4), whole_mesh(), [Partial()])}
    same_everywhere(lambda: secateur.prune(partial_sums, 0.5), secateur.errors.BadTensor, "Partial")
    cut = {"fc.weight": DTensor.from_local(torch.ones(4, 3), whole_mesh(), [Shard(1)])}
    same_everywhere(lambda: secateur.prune(cut, pattern="2:4"), secateur.BadInput, "")
    lying = torch.ones(2 + dist.get_rank(), 4)  # five rows are cut into three and two
    wrong = DTensor.from_local(lying, whole_mesh(), [Shard(0)], shape=torch.Size((5, 4)), stride=(4, 1))
    same_everywhere(lambda: secateur.prune(wrong, 0.5), secateur.errors.BadTensor, "distribute it anew")


CASES: dict[int, dict[str, Callable[[], None]]] = {
    1: {},
    2: {
        **{f"combinations, {n}": partial(combinations, n) for n in CUTS[2]},
        **{f"amounts, {n}": partial(amounts, n) for n in CUTS[2]},
        "odd shapes": odd_shapes,
        "heads": heads,
        "ties": ties,
        "plans and masks": plans_and_masks,
        "after a forward pass": after_a_forward_pass,
        "copies that differ": copies_that_differ,
        "strided shards": strided_shards,
        "bad values": bad_values,
        "errors of one": errors_of_one,
        "refusals": refusals,
    },
    4: {
        **{f"combinations, {n}": partial(combinations, n) for n in CUTS[4]},
        **{f"amounts, {n}": partial(amounts, n) for n in CUTS[4]},
        "odd shapes": odd_shapes,
        "bad values": bad_values,
    },
}


def main(rank: int, world: int, folder: Path, one_in: str, chosen: str = "") -> None:
    """Runs the cases whose name has ``chosen`` in it, and of the combinations ``one_in`` so many."""
    global every
    every = int(one_in)
    join(rank, world, folder)
    cases = CASES[world] | {n: partial(c, folder) for n, c in sharded_training.CASES[world].items()}
    found = run_all({n: c for n, c in cases.items() if chosen in n})
    if rank == 0:
        (folder / f"found-{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
