"""Promise 9: bad input is refused, by name, before anything is touched, by every verb and in every combination.

`tests/unit/test_bad_*.py` have the whole list of what is bad; here is that there is no way round a refusal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from tests.contract.nets import Net, bits, net, snapshot
from tests.contract.table import PLAIN, Case, expected_warnings, ids


def with_value(value: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        w = torch.ones(32, 8)
        w[3, 2] = w[31, 7] = value
        return w

    return make


def made_in_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(32, 8)


def sparse() -> Tensor:
    return torch.eye(32, 8).to_sparse()


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "NaN": (with_value(math.nan), "holds 2 NaN or infinite weights.*nonfinite='keep'.*nonfinite='prune'"),
    "Inf": (with_value(-math.inf), "holds 2 NaN or infinite weights.*Repair the model"),
    "int8": (lambda: torch.ones(32, 8, dtype=torch.int8), "integers or quantised values.*quantise afterwards"),
    "bool": (lambda: torch.ones(32, 8, dtype=torch.bool), "integers or quantised values.*ignore="),
    "complex": (lambda: torch.ones(32, 8, dtype=torch.complex64), "complex; pass torch.view_as_real"),
    "e8m0": (lambda: torch.ones(32, 8).to(torch.float8_e8m0fnu), "holds scales or packed values.*supported are"),
    "meta": (lambda: torch.ones(32, 8, device="meta"), "meta device.*load the weights first"),
    "inference": (made_in_inference, "inference_mode.*clone it"),
    "expanded": (lambda: torch.ones(32, 1).expand(32, 8), r"expanded.*pass t\.contiguous\(\)"),
    "sparse": (sparse, r"layout is sparse_coo.*pass t\.to_dense\(\)"),
}
FIRST_OF_EACH = [c for c in PLAIN if c.allocation in ("global", "uniform", "erk", "lamp") and c.criterion != "function"]
FILES = ("NaN", "Inf", "int8", "bool", "complex", "e8m0")


def target(kind: str) -> dict[str, Tensor]:
    """Good tensors around a bad one."""
    good = net()
    return {
        "conv.weight": good.conv.weight.detach(), "conv.bias": good.conv.bias.detach(),  # type: ignore[union-attr]
        "fc1.weight": BAD[kind][0](), "fc2.weight": good.fc2.weight.detach(),
    }  # fmt: skip


def safe_bits(t: Tensor) -> object:
    if t.is_meta:
        return tuple(t.shape)
    if t.layout is not torch.strided:
        return bits(t.to_dense())
    return (bits(t.real), bits(t.imag)) if t.is_complex() else bits(t)


def refused(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("case", FIRST_OF_EACH, ids=ids(FIRST_OF_EACH))
def test_bad_tensors_are_refused_in_every_combination(case: Case, tmp_path: Path) -> None:
    for kind, (_, text) in BAD.items():
        weights = target(kind)
        before = {n: safe_bits(t) for n, t in weights.items()}
        dtype = str(weights["fc1.weight"].dtype).removeprefix("torch.")
        said = rf"'fc1.weight' \(shape \(32, 8\), {dtype}\).*{text}"
        for verb in (secateur.prune, secateur.plan):
            refused(secateur.BadTensor, said, partial(verb, weights, **case.asked()))
        assert {n: safe_bits(t) for n, t in weights.items()} == before, kind
        if kind in FILES and str(case) == str(FIRST_OF_EACH[0]):
            source, out = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-out.safetensors"
            save_file({n: t.contiguous() for n, t in weights.items()}, source)
            on_disk = source.read_bytes()
            refused(secateur.BadTensor, said, lambda: secateur.prune(source, **case.asked(), out=out))  # noqa: B023
            assert source.read_bytes() == on_disk
            assert sorted(p.name for p in tmp_path.glob(f"*{kind}*")) == [source.name]


@pytest.mark.parametrize("kind", [k for k in BAD if k not in ("NaN", "Inf")])
def test_masks_and_their_application_refuse_too(kind: str) -> None:
    weights = target(kind)
    before = {n: safe_bits(t) for n, t in weights.items()}
    refused(secateur.BadTensor, "'fc1.weight'", lambda: secateur.masks(weights))
    masks = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in weights.items() if n.endswith("weight")}
    refused(secateur.BadTensor, "'fc1.weight'", lambda: secateur.apply(masks, weights))
    plan = secateur.plan({n: torch.ones(t.shape) for n, t in weights.items()}, 0.5, allocation="uniform")
    refused(secateur.SecateurError, "'fc1.weight'", lambda: secateur.apply(plan, weights))
    assert {n: safe_bits(t) for n, t in weights.items()} == before
    assert secateur.inspect(weights)["fc1.weight"].shape == (32, 8)  # looking is always possible


def test_bad_tensors_that_are_not_chosen_do_not_matter() -> None:
    for kind in BAD:
        weights = target(kind)
        before = safe_bits(weights["fc1.weight"])
        assert secateur.prune(weights, 0.5, ignore="fc1").total == 96 + 128
        assert safe_bits(weights["fc1.weight"]) == before
        assert secateur.prune(target(kind), 0.5, include=["conv", "fc2"]).zeros == 112


def pruned_by_torch() -> Net:
    model = net()
    nn.utils.prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    return model


def parametrised() -> Net:
    model = net()
    nn.utils.parametrizations.weight_norm(model.fc1)
    return model


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))


class SomebodysParameter(nn.Parameter):
    """As libraries for 4-bit weights make them: packed integers, two values a byte."""


class Linear4bit(nn.Linear):
    """As libraries for 4-bit weights make them: a linear layer with packed weights."""

    def __init__(self) -> None:
        super().__init__(8, 4, bias=False)
        packed = torch.zeros(16, 1, dtype=torch.uint8)
        self.weight = SomebodysParameter(packed, requires_grad=False)


class Linear8bit(nn.Linear):
    """The same for 8 bits."""

    def __init__(self) -> None:
        super().__init__(8, 4, bias=False)
        self.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch.nn.utils.prune": (pruned_by_torch, r"'fc1.weight' \(shape \(32, 8\).*from_torch_prune\(model\)"),
    "parametrised": (parametrised, r"'fc1.weight' \(shape \(32, 8\).*remove_parametrizations"),
    "lazy": (lazy, r"'1.weight' \(shape not known yet.*run a forward pass first"),
    "8 bit": (lambda: nn.Sequential(nn.Linear(8, 8), Linear8bit()), r"'1.weight' \(shape \(4, 8\), int8\).*quantise"),
    "4 bit": (lambda: nn.Sequential(nn.Linear(8, 8), Linear4bit()), r"'1.weight' \(shape \(16, 1\), uint8\).*quanti"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_modules_that_compute_or_pack_their_weights(kind: str) -> None:
    make, text = MODELS[kind]
    model = make()
    before = [safe_bits(t) for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)]
    for call in (
        lambda: secateur.prune(model, 0.5), lambda: secateur.plan(model, pattern="2:4"),
        lambda: secateur.prune(model, threshold=0.1), lambda: secateur.masks(model),
        lambda: secateur.prune(model, 0.5, pattern="channel", criterion="random"),
    ):  # fmt: skip
        refused(secateur.BadTensor, text, call)
    after = [safe_bits(t) for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)]
    assert after == before


BIASES: dict[str, Callable[[], nn.Parameter]] = {
    "expanded": lambda: nn.Parameter(torch.ones(1).expand(32), requires_grad=False),
    "meta": lambda: nn.Parameter(torch.ones(32, device="meta")),
    "integers": lambda: nn.Parameter(torch.ones(32, dtype=torch.int32), requires_grad=False),
    "complex": lambda: nn.Parameter(torch.ones(32, dtype=torch.complex64)),
}


@pytest.mark.parametrize("kind", BIASES)
def test_a_bias_that_cannot_follow_its_channels_is_refused_first(kind: str) -> None:
    model = net()
    model.fc1.bias = BIASES[kind]()
    before = {n: safe_bits(t) for n, t in model.state_dict().items()}
    with expected_warnings():
        refused(secateur.BadTensor, "'fc1.bias'", lambda: secateur.prune(model, 0.5, pattern="channel"))
        assert {n: safe_bits(t) for n, t in model.state_dict().items()} == before
        if kind != "meta":
            assert secateur.prune(model, 0.5, pattern="channel:in").zeros > 0  # where no bias is concerned


def test_a_bias_under_a_mask_cannot_follow_its_channels() -> None:
    model = net()
    nn.utils.prune.l1_unstructured(model.fc1, "bias", amount=1)
    before = snapshot(model)
    with pytest.raises(secateur.BadInput, match=r"fc1.bias.*from_torch_prune"):
        secateur.prune(model, 0.5, pattern="channel")
    assert snapshot(model) == before


def plans_for_others() -> list[tuple[str, Callable[[], secateur.Plan], str]]:
    def other(change: Callable[[Net], Any]) -> Callable[[], secateur.Plan]:
        def make() -> secateur.Plan:
            model = net()
            change(model)
            return secateur.plan(model, 0.5)

        return make

    def rename(m: Net) -> None:
        m.fc3 = m.fc2
        del m.fc2

    def reshape(m: Net) -> None:
        m.fc2.weight.data = m.fc2.weight.data.view(8, 16)

    def retype(m: Net) -> None:
        m.fc2.weight.data = m.fc2.weight.data.bfloat16()

    return [
        ("name", other(rename), r"'fc3.weight'.*no such tensor; it has .*'?fc2.weight"),
        ("shape", other(reshape), r"'fc2.weight' \(shape \(8, 16\), float32\).*has 'fc2.weight' \(shape \(4, 32\)"),
        ("dtype", other(retype), r"'fc2.weight' \(shape \(4, 32\), bfloat16\).*make a new plan"),
        ("values", lambda: secateur.plan(net(seed=1), 0.5), r"'\w+.weight' \(shape .*values are not those"),
    ]


@pytest.mark.parametrize("what", [p[0] for p in plans_for_others()])
def test_plans_for_other_tensors_are_refused_whole(what: str, tmp_path: Path) -> None:
    (make, text), *_ = [(m, t) for n, m, t in plans_for_others() if n == what]
    plan, model = make(), net()
    before = snapshot(model)
    refused(secateur.PlanMismatch, text, lambda: secateur.apply(plan, model))
    refused(secateur.PlanMismatch, text, lambda: secateur.apply(plan, model.state_dict()))
    assert snapshot(model) == before
    source = tmp_path / "model.safetensors"
    save_file(model.state_dict(), source)
    refused(secateur.PlanMismatch, text, lambda: secateur.apply(plan, source, out=tmp_path / "out.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_a_plan_of_channels_needs_the_biases_it_was_made_with() -> None:
    model = net()
    with expected_warnings():
        plan = secateur.plan(model, 0.5, pattern="channel")
    state = {n: t for n, t in model.state_dict().items() if n != "fc1.bias"}
    before = snapshot(state)
    refused(secateur.PlanMismatch, "fc1.bias", lambda: secateur.apply(plan, state))
    state["fc1.bias"] = torch.ones(31)
    refused(secateur.PlanMismatch, "fc1.bias", lambda: secateur.apply(plan, state))
    del state["fc1.bias"]
    assert snapshot(state) == before
