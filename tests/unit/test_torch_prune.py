"""Models under `torch.nn.utils.prune`, made plain again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.errors import BadInput, BadTensor
from secateur.stores.torch_prune import bake, find


class Net(nn.Module):
    """A convolution, a linear layer, attention and recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRUCell(12, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).transpose(1, 2)
        y, _ = self.attention(y, y, y)
        y, _ = self.lstm(y)
        return self.fc(self.gru(y[:, -1]))


PRUNED = [
    ("conv", "weight"), ("conv", "bias"), ("attention", "in_proj_weight"), ("attention.out_proj", "weight"),
    ("lstm", "weight_ih_l0"), ("lstm", "weight_hh_l0_reverse"), ("lstm", "bias_ih_l1"), ("gru", "weight_ih"),
    ("fc", "weight"), ("fc", "bias"),
]  # fmt: skip
NAMES = [
    "conv.weight", "conv.bias", "attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0",
    "lstm.weight_hh_l0_reverse", "lstm.bias_ih_l1", "gru.weight_ih", "fc.weight", "fc.bias",
]  # fmt: skip


def pruned(model: nn.Module | None = None) -> nn.Module:
    model = model or Net()
    for path, name in PRUNED:
        prune.random_unstructured(model.get_submodule(path), name, 0.5)
    return model


def assert_plain(model: nn.Module, like: nn.Module) -> None:
    """No trace of pruning: the state, order included, and the innards of every module are those of a fresh
    model."""
    assert not prune.is_pruned(model)
    assert list(model.state_dict()) == list(like.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in like.named_parameters()]
    for module, fresh in zip(model.modules(), like.modules(), strict=True):
        assert module.__dict__.keys() == fresh.__dict__.keys()
        assert list(module._buffers) == list(fresh._buffers)
        assert not module._forward_pre_hooks


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(2, 3, 5)).square().sum().backward()
    optimizer.step()


def test_find() -> None:
    model = pruned()
    found = find(model)
    assert [(n, t) for n, _, t in found] == [(n, t) for n, t in PRUNED]
    assert all(m is model.get_submodule(n) for n, m, _ in found)
    assert find(Net()) == []
    assert [(n, t) for n, _, t in find(prune.identity(nn.Linear(2, 2), "weight"))] == [("", "weight")]


def test_everything_becomes_plain() -> None:
    model = pruned()
    originals = {n: p for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in originals.items()}
    masks = dict(model.named_buffers())
    assert bake(model) == NAMES
    assert_plain(model, Net())
    parameters = dict(model.named_parameters())
    for name in NAMES:
        assert parameters[name] is originals[f"{name}_orig"]
        mask = masks[f"{name}_mask"]
        expected = torch.where(mask == 0, 0.0, values[f"{name}_orig"])
        bits = parameters[name].detach().view(torch.int32)  # tells -0.0 from 0.0
        assert torch.equal(bits, expected.view(torch.int32)), name
        assert 0 < int((parameters[name] == 0).sum()) < parameters[name].numel()
    for name in parameters.keys() - set(NAMES):
        assert parameters[name] is originals[name]
        assert torch.equal(parameters[name], values[name])


def test_the_network_computes_the_same() -> None:
    model, x = pruned().eval(), torch.randn(2, 3, 5)
    with torch.no_grad():
        expected = model(x)
        bake(model)
        assert torch.equal(model(x), expected)


def test_it_uses_what_was_trained_last() -> None:
    """The plain attribute is what the last forward saw; the optimizer has moved on since."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    stale = model[0].weight.detach().clone()
    expected = model[0].weight_orig.detach() * model[0].weight_mask
    bake(model)
    assert torch.equal(model[0].weight, expected)
    assert not torch.equal(model[0].weight, stale)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_afterwards(make: Callable[..., nn.RNNBase]) -> None:
    rnn = make(4, 5, num_layers=2)
    weights = [n for n, _ in rnn.named_parameters() if n.startswith("weight")]
    for name in weights:
        prune.l1_unstructured(rnn, name, 0.5)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
    bake(rnn)
    assert [id(w) for w in rnn._flat_weights] == [id(getattr(rnn, n)) for n in rnn._flat_weights_names]
    x = torch.randn(6, 2, 4)
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        out = rnn(x)[0]
        outputs.append(out.detach())
        out.square().sum().backward()
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    assert all(p.grad is not None and p.grad.any() for p in rnn.parameters())
    fresh = make(4, 5, num_layers=2)
    fresh.load_state_dict(rnn.state_dict())
    assert torch.equal(fresh(x)[0], rnn(x)[0])


def test_an_optimizer_goes_on() -> None:
    """It was built on the masked model, and its state is still that of the same parameters."""
    model = pruned()
    prune.remove(model.get_submodule("attention.out_proj"), "weight")  # cannot train: its hook never runs
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    bake(model)
    assert {id(p) for p in model.parameters()} == held == {id(p) for p in optimizer.state}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer)
    moved = {n: not torch.equal(p, before[n]) for n, p in model.named_parameters()}
    assert moved == {n: bool(p.grad.any()) for n, p in model.named_parameters()}
    assert sum(moved.values()) == len(moved) - 2  # two recurrent weights only ever meet the first, zero state


def test_attention_trains_afterwards() -> None:
    """Under the mask a second backward raises: the hook of out_proj never runs."""
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    prune.l1_unstructured(layer.out_proj, "weight", 0.5)
    prune.l1_unstructured(layer, "in_proj_weight", 0.5)
    bake(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x, x, x)[0].square().sum().backward()
        optimizer.step()
    assert layer.out_proj.weight.grad is not None and layer.in_proj_weight.grad is not None


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_copies(again: Callable[[nn.Module], nn.Module]) -> None:
    model, x = pruned(), torch.randn(2, 3, 5)
    model.fc(torch.randn(1, 6))
    bake(model)
    twin = again(model).eval()
    assert_plain(twin, Net())
    assert torch.equal(twin(x), model.eval()(x))


def test_strict_loading_both_ways() -> None:
    model, fresh = pruned(), Net()
    bake(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    model.load_state_dict(fresh.state_dict(), strict=True)
    x = torch.randn(2, 3, 5)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_containers_global_and_structured() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(2, 4, 3))
    prune.global_unstructured([(model[0], "weight"), (model[1], "weight")], prune.L1Unstructured, amount=0.5)
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert isinstance(next(iter(model[0]._forward_pre_hooks.values())), prune.PruningContainer)
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    prune.custom_from_mask(model[2], "bias", torch.tensor([1, 0, 1, 0]))
    masks = {n: m.clone() for n, m in model.named_buffers()}
    assert bake(model) == ["0.weight", "1.weight", "2.weight", "2.bias"]
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name.removesuffix("_mask")) == 0, mask == 0)
    assert int((model[2].weight.flatten(1) == 0).all(1).sum()) == 2


def test_nan_and_signs_under_the_mask() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[float("nan"), -1.0, float("inf"), -0.0]])
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 0, 0, 1]]))
    bake(layer)
    assert layer.weight.detach().view(torch.int32).tolist() == [[0, 0, 0, -(2**31)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_boolean_masks(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4).to(dtype)
    prune.custom_from_mask(layer, "weight", torch.eye(4, dtype=torch.bool))
    layer.weight_mask = layer.weight_mask.bool()
    expected = layer.weight_orig.detach() * torch.eye(4, dtype=dtype)
    bake(layer)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, expected)


def test_other_hooks_and_gradients_stay() -> None:
    layer = nn.Linear(4, 4)
    calls: list[str] = []
    first = layer.register_forward_pre_hook(lambda m, args: calls.append("first"))
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.register_forward_pre_hook(lambda m, args, kwargs: calls.append("second"), with_kwargs=True)
    layer(torch.randn(1, 4)).sum().backward()
    gradient = layer.weight_orig.grad
    calls.clear()
    bake(layer)
    layer(torch.randn(1, 4))
    assert calls == ["first", "second"]
    assert layer.weight.grad is gradient is not None
    first.remove()
    assert len(layer._forward_pre_hooks) == 1
    frozen = nn.Linear(4, 4).requires_grad_(False)
    prune.l1_unstructured(frozen, "weight", 0.5)
    bake(frozen)
    assert not frozen.weight.requires_grad


def tied(both: bool) -> nn.Module:
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    model.head.weight = model.embedding.weight
    rows = torch.arange(6)[:, None].expand(6, 4)
    prune.custom_from_mask(model.head, "weight", ((rows != 1) & (rows != 2)).float())
    if both:
        prune.custom_from_mask(model.embedding, "weight", ((rows != 2) & (rows != 3)).float())
    return model


@pytest.mark.parametrize(("both", "rows"), [(True, [1, 2, 3]), (False, [1, 2])])
def test_ties(both: bool, rows: list[int]) -> None:
    model = tied(both)
    assert bake(model) == (["embedding.weight", "head.weight"] if both else ["head.weight"])
    assert model.embedding.weight is model.head.weight
    assert (model.head.weight == 0).all(1).nonzero().flatten().tolist() == rows
    assert int((model.head.weight == 0).sum()) == 4 * len(rows)
    assert list(model.state_dict()) == ["embedding.weight", "head.weight"]


def test_a_module_registered_twice() -> None:
    fc = nn.Linear(4, 4)
    prune.l1_unstructured(fc, "weight", 0.5)
    assert bake(nn.Sequential(fc, nn.ReLU(), fc)) == ["0.weight"]
    assert int((fc.weight == 0).sum()) == 8


@pytest.mark.parametrize(
    ("module", "pruned_names"),
    [
        (nn.Linear(4, 4), ["bias", "weight"]),
        (nn.LSTMCell(4, 4), ["weight_ih"]),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True), ["k_proj_weight", "bias_k"]),
        (nn.LSTM(4, 4, 2, proj_size=2), ["weight_hr_l0", "bias_hh_l0", "weight_ih_l1"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_order_is_that_of_a_fresh_module(module: nn.Module, pruned_names: list[str]) -> None:
    order = list(module.state_dict())
    for name in pruned_names:
        prune.random_unstructured(module, name, 0.5)
    assert list(module.state_dict()) != order
    bake(module)
    assert list(module.state_dict()) == order


def test_order_in_modules_of_unknown_kind() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("scale", "up_weight", "up_bias", "last"):
                self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))

    model = Scaled()
    prune.l1_unstructured(model, "up_weight", 0.5)
    bake(model)
    assert list(model.state_dict()) == ["scale", "up_weight", "up_bias", "last"]


# --- refusals
# ---------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, match: str, error: type[Exception] = BadTensor) -> None:
    """Refused, and every tensor and name as before."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match):
        bake(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def two() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    for layer in model:
        prune.l1_unstructured(layer, "weight", 0.5)
    return model


def test_nothing_to_bake() -> None:
    refused(nn.Sequential(nn.Linear(2, 2)), "this Sequential is not under torch.nn.utils.prune", BadInput)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_masks_that_scale(value: float) -> None:
    model = two()
    model[1].weight_mask[0, 0] = value
    what = r"'1.weight' \(shape \(3, 4\), float32\)"
    refused(model, rf"mask of {what} holds 1 values other than 0 and 1, such as {value}")


def test_nan_in_a_mask() -> None:
    model = two()
    model[1].weight_mask[0, 0] = float("nan")
    with pytest.raises(BadTensor, match="other than 0 and 1, such as nan"):
        bake(model)
    assert not (model[0].weight_orig == 0).any()


def test_mask_of_another_shape() -> None:
    model = two()
    model[1].weight_mask = torch.ones(4)  # would broadcast
    refused(model, r"mask of '1.weight' .* has the shape \(4,\)")


@pytest.mark.parametrize("lost", ["weight_orig", "weight_mask"])
def test_broken_state(lost: str) -> None:
    model = two()
    delattr(model[1], lost)
    refused(model, rf"'1.weight' has a pruning hook .* but no \w+ '1.{lost}'")


def test_name_taken() -> None:
    model = two()
    del model[1].weight
    model[1].weight = nn.Parameter(torch.randn(3, 4))
    refused(model, "'1.weight' is a parameter and '1.weight_orig' another")


def test_tensors_that_cannot_be_written() -> None:
    model = two()
    model[1].weight_orig = nn.Parameter(torch.randn(3, 1).expand(3, 4))
    refused(model, "is expanded")
    with torch.inference_mode():
        made_there: Any = two()
    with pytest.raises(BadTensor, match="inference_mode"):
        bake(made_there)
    with pytest.raises(BadTensor, match="meta"):
        bake(two().to("meta"))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(BadInput, match=r"takes an nn\.Module; got dict"):
        bake({})  # type: ignore[arg-type]
