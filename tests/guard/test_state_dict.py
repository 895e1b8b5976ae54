"""After every verb a model is what it was: keys, shapes, dtypes, flags, hooks, copies. Only values may differ."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur

NO_MODEL = {
    "compare",
    "elementwise",
    "from_packed",
    "load_plan",
    "magnitude",
    "random",
    "save_plan",
    "unpack_file",
    "verify",
}
"""Public functions that are never given a model."""


class Net(nn.Module):
    """A convolution with a norm, an embedding with a tied layer, a recurrent layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.emb = nn.Embedding(6, 8)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 6, bias=False)
        self.out.weight = self.emb.weight
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, h, w) -> (batch, h * w, 6)."""
        h = self.drop(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        h = self.lstm(h)[0]
        h = self.attention(h, h, h)[0] + self.emb.weight[0]
        out: Tensor = self.out(self.fc(h).relu())
        return out


def net() -> Net:
    """Some of it frozen, some in eval mode, some with gradients, all with hooks of the user's own."""
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    model.fc.weight.grad = None
    model.lstm.weight_ih_l0.requires_grad_(False)
    model.norm.eval()
    model.fc.register_forward_hook(lambda module, args, output: None)
    model.conv.weight.register_hook(lambda grad: None)
    return model


def images(count: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 3, 3, generator=g) for _ in range(count)]


def apply_plan(model: nn.Module) -> object:
    return secateur.apply(secateur.plan(model, 0.5), model)


def apply_masks(model: nn.Module) -> object:
    other = copy.deepcopy(model)
    secateur.prune(other, 0.5)
    return secateur.apply(secateur.masks(other), model)


def channels(model: nn.Module) -> object:
    with pytest.warns(secateur.SecateurWarning):
        return secateur.prune(model, 0.5, pattern="channel")


def plan_by_a_function(model: nn.Module) -> object:
    """One that writes into what it is given."""
    return secateur.plan(model, 0.5, criterion=lambda weight: weight.neg_(), allocation="uniform")


def with_data(model: nn.Module) -> object:
    """By Wanda's score; the projections of attention are packed, and recurrent layers are not observed."""
    with pytest.warns(secateur.SecateurWarning, match="3 tensors stay dense"):
        return secateur.prune(model, 0.5, criterion="wanda", calibration=secateur.Calibration(images(), blocks="whole"))


def solved(model: nn.Module) -> object:
    """Two blocks, one after the other, the second on what the first gives."""
    calibration = secateur.Calibration(images(), blocks=["conv", "norm"])
    with pytest.warns(secateur.SecateurWarning, match="3 tensors stay dense"):
        return secateur.prune(model, 0.5, solver="sparsegpt", calibration=calibration, ignore="lstm")


def bake(model: nn.Module) -> object:
    """From a model under torch.nn.utils.prune, whose zeros stay."""
    nn.utils.prune.l1_unstructured(model.get_submodule("fc"), "weight", amount=0.5)
    nn.utils.prune.random_unstructured(model.get_submodule("conv"), "weight", amount=0.5)
    return secateur.from_torch_prune(model)


def scanned(model: nn.Module) -> object:
    def first_weight(m: nn.Module) -> float:
        return float(next(m.parameters()).abs().mean())

    return secateur.sensitivity(model, first_weight, [0.5], higher_is_better=True)


def saved(model: nn.Module) -> object:
    with tempfile.TemporaryDirectory() as folder:
        return secateur.save_packed(model, Path(folder) / "packed.safetensors")


def exported(model: nn.Module) -> object:
    with tempfile.TemporaryDirectory() as folder:
        return secateur.export(model, Path(folder) / "model.safetensors", "safetensors")


VERBS: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "prune": ("prune", lambda m: secateur.prune(m, 0.5)),
    "prune 2:4": ("prune", lambda m: secateur.prune(m, pattern="2:4")),
    "prune channels": ("prune", channels),
    "prune by a function": ("prune", lambda m: secateur.prune(m, 0.5, criterion=lambda weight: -weight, allocation="erk")),
    "apply a plan": ("apply", apply_plan),
    "apply masks": ("apply", apply_masks),
    "plan": ("plan", lambda m: secateur.plan(m, 0.5)),
    "plan by a function": ("plan", plan_by_a_function),
    "inspect": ("inspect", secateur.inspect),
    "masks": ("masks", secateur.masks),
    "from_torch_prune": ("from_torch_prune", bake),
    "prune with data": ("prune", with_data),
    "prune with a solver": ("prune", solved),
    "sensitivity": ("sensitivity", scanned),
    "calibrate": ("calibrate", lambda m: secateur.calibrate(m, images(), "hessian", ignore=["*_proj_weight", "lstm"])),
    "count_flops": ("count_flops", lambda m: secateur.count_flops(m, images()[0])),
    "recalibrate_batchnorm": ("recalibrate_batchnorm", lambda m: secateur.recalibrate_batchnorm(m, images(3))),
    "save_packed": ("save_packed", saved),
    "export": ("export", exported),
    "bench": ("bench", lambda m: secateur.bench(m, rows=(1,), turns=3, memory=False)),
}  # fmt: skip
TRAINS = {"iterate"}  # leaves a model with other values; tests/unit/test_iterative.py
PACKS = {"pack", "unpack", "load_packed"}  # a packed model is another thing; tests/unit/test_packed_modules.py
WRITES = {"prune", "apply", "from_torch_prune", "recalibrate_batchnorm", "sensitivity"}  # which puts it back


def test_every_public_function_is_here() -> None:
    functions = {n for n in secateur.__all__ if inspect.isfunction(getattr(secateur, n))}
    assert functions == {verb for verb, _ in VERBS.values()} | NO_MODEL | TRAINS | PACKS


def hooks(model: nn.Module) -> list[Any]:
    """How many hooks of each kind every module and parameter has."""
    modules = [
        sorted((k, len(v)) for k, v in vars(m).items() if "hooks" in k and hasattr(v, "__len__"))
        for m in model.modules()
    ]
    return [*modules, *[len(p._backward_hooks or ()) for p in model.parameters()]]


def facts(model: nn.Module) -> dict[str, Any]:
    """Everything but values."""
    return {
        "keys": [(n, t.shape, t.dtype, t.stride()) for n, t in model.state_dict().items()],
        "modules": [(n, type(m), m.training) for n, m in model.named_modules()],
        "parameters": [
            (n, id(p), p.requires_grad, p.is_leaf, p.grad is None, p.data_ptr())
            for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "gradients": [None if p.grad is None else p.grad.clone().flatten().tolist() for p in model.parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "hooks": hooks(model),
        "attributes": [sorted(k for k in vars(m)) for m in model.modules()],
        "mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


def values(model: nn.Module) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", VERBS)
def test_a_model_is_what_it_was(name: str) -> None:
    model = net()
    before, random = facts(model), torch.get_rng_state()
    VERBS[name][1](model)
    after = facts(model)
    for what, found in before.items():
        assert after[what] == found, what
    if VERBS[name][0] != "from_torch_prune":  # whose set-up draws a random mask
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", VERBS)
def test_its_state_goes_both_ways(name: str) -> None:
    model = net()
    VERBS[name][1](model)
    fresh = Net()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert values(fresh) == values(model)
    model.load_state_dict(Net().state_dict(), strict=True)


@pytest.mark.parametrize("name", VERBS)
def test_copies_are_like_it(name: str) -> None:
    model = net()
    VERBS[name][1](model)
    copied = copy.deepcopy(model)
    assert values(copied) == values(model)
    assert copied.out.weight is copied.emb.weight
    assert {id(p) for p in copied.parameters()}.isdisjoint(id(p) for p in model.parameters())
    model.eval(), copied.eval()
    assert torch.equal(copied(images()[0]), model(images()[0]))


@pytest.mark.parametrize("name", VERBS)
def test_it_trains_on(name: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    VERBS[name][1](model)
    before = values(model)
    model(images()[0]).sum().backward()
    optimizer.step()
    after = values(model)
    assert {n for n in before if after[n] != before[n]} >= {"conv.weight", "fc.weight", "emb.weight", "out.weight"}


@pytest.mark.parametrize("name", VERBS)
def test_versions_tell_autograd_what_was_written(name: str) -> None:
    """A tensor whose values changed has a new version; where nothing is written, nothing has."""
    model = net()
    if VERBS[name][0] == "from_torch_prune":
        nn.utils.prune.identity(model.fc, "weight")
        nn.utils.prune.remove(model.fc, "weight")
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    versions, old = {n: t._version for n, t in everything.items()}, {n: t.clone() for n, t in everything.items()}
    VERBS[name][1](model)
    for n, t in everything.items():
        if not torch.equal(t, old[n]):
            assert t._version > versions[n], n
        if VERBS[name][0] not in WRITES:
            assert t._version == versions[n], n
            assert torch.equal(t, old[n]), n


@pytest.mark.parametrize(
    "name", [n for n, (verb, _) in VERBS.items() if verb in ("prune", "apply", "plan", "masks", "inspect")]
)
def test_a_frozen_model_is_pruned_alike(name: str) -> None:
    want = net()
    VERBS[name][1](want)
    frozen = net().requires_grad_(False)
    VERBS[name][1](frozen)
    assert values(frozen) == values(want)
    assert not any(p.requires_grad for p in frozen.parameters())
