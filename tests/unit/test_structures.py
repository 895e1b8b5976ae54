"""Statistics of channels and heads, against hooks and sums written out here; and a model that is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from secateur.core.structure import mean_activation
from secateur.errors import BadInput
from tests.unit.calibrating import whole_of
from tests.unit.test_heads_of_models import BERT, GPT2, GROUPED, into, pretrained

CHANNELS = ("channel_activation", "channel_apoz")


class Net(nn.Module):
    """Feature maps behind every kind of way: module and function, norm or none, pooled, a shortcut, a hand-written gate."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(1, 4, 3, padding=1)
        self.normed, self.bn = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pooled = nn.Conv2d(6, 5, 3, padding=1)
        self.short, self.bn2 = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)
        self.deep = nn.Conv2d(5, 5, 3, groups=5)
        self.up = nn.ConvTranspose2d(5, 3, 2)
        self.gate, self.fc = nn.Linear(3, 8), nn.Linear(8, 3)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.plain(x))
        x = F.relu(self.bn(self.normed(x)))
        x = torch.relu(F.max_pool2d(self.dropout(self.pooled(x)), 2))
        x = (x + self.bn2(self.short(x))).relu()
        x = F.hardtanh(self.up(F.leaky_relu(self.deep(x), 0.1)), 0.0, 6.0)
        h = self.gate(x.mean((2, 3)))
        out: Tensor = self.fc(h * torch.sigmoid(1.702 * h))
        return out


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for norm in (model.bn, model.bn2):
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.data = torch.randn(t.shape).abs() + 0.1 if t is norm.running_var else torch.randn(t.shape)
    return model


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4 + i, 1, 10, 10, generator=g), torch.randint(0, 3, (4 + i,), generator=g)) for i in range(n)]


def maps(model: Net, x: Tensor) -> dict[str, Tensor]:
    """The feature map of each layer, by hand."""
    m, out = model, {}
    x = out["plain"] = F.relu(m.plain(x))
    x = out["normed"] = F.relu(m.bn(m.normed(x)))
    x = out["pooled"] = F.relu(F.max_pool2d(m.pooled(x), 2))
    out["short"] = m.bn2(m.short(x))
    x = F.relu(x + out["short"])
    x = out["deep"] = F.leaky_relu(m.deep(x), 0.1)
    x = out["up"] = F.relu6(m.up(x))
    h = m.gate(x.mean((2, 3)))
    out["gate"] = h
    out["fc"] = m.fc(h * torch.sigmoid(1.702 * h))
    return out


def test_feature_maps_behind_the_nonlinearity() -> None:
    model = net()
    found = secateur.calibrate(model, batches(), CHANNELS)
    with torch.no_grad():
        each = [maps(copy.deepcopy(model).eval(), x) for x, _ in batches()]
    assert set(found) == {f"{name}.weight" for name in each[0]}
    for name in each[0]:
        flat = torch.cat([m[name].movedim(1, 0).flatten(1) for m in each], 1).double()
        own = found[f"{name}.weight"]
        assert torch.allclose(own["channel_activation"].double(), flat.abs().mean(1), rtol=1e-5), name
        assert torch.equal(own["channel_apoz"], (flat == 0).double().mean(1).float()), name
    assert 0 < float(found["plain.weight"]["channel_apoz"].mean()) < 1
    assert float(found["fc.weight"]["channel_apoz"].max()) == 0


def test_the_scale_is_that_of_the_norm_behind() -> None:
    model = net()
    found = secateur.calibrate(model, batches(1), ("norm_scale",), include=["normed", "short"])
    assert torch.equal(found["normed.weight"]["norm_scale"], model.bn.weight.detach().abs())
    assert torch.equal(found["short.weight"]["norm_scale"], model.bn2.weight.detach().abs())
    with pytest.raises(BadInput, match=r"no BatchNorm with factors lies right behind 'deep\.weight'"):
        secateur.calibrate(model, batches(1), ("norm_scale",), include=["normed", "deep"])


def test_a_transposed_conv1d_and_an_activation_behind_a_view() -> None:
    model = pretrained("GPT2Model", activation_function="relu", **GPT2)()
    ids = {"input_ids": torch.arange(10).view(2, 5)}
    found = secateur.calibrate(model, [ids], CHANNELS, include="*.c_fc")
    with torch.no_grad(), into(model.h[0].mlp.c_proj) as seen:
        model(**ids)
    (behind,) = (t.flatten(0, 1).double() for t in seen)
    own = found["h.0.mlp.c_fc.weight"]
    assert torch.allclose(own["channel_activation"].double(), behind.abs().mean(0), rtol=1e-5)
    assert (
        torch.equal(own["channel_apoz"], (behind == 0).double().mean(0).float())
        and 0 < float(own["channel_apoz"].mean()) < 1
    )


def test_a_layer_that_is_called_twice_and_a_tied_one() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), other)
    x = torch.randn(5, 4)
    found = secateur.calibrate(model, [x], ("channel_activation",))
    with torch.no_grad():
        first = layer(x).relu()
        second = layer(first).relu()
        third = other(second)
    mean = torch.cat([first, second, third]).double().abs().mean(0)
    assert torch.allclose(found["0.weight"]["channel_activation"].double(), mean, rtol=1e-5)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_taylor_is_the_square_of_the_first_order_change_of_each_batch() -> None:
    model = net().double()
    data = [(x.double(), y) for x, y in batches()]
    found = secateur.calibrate(model, secateur.Calibration(data, loss=loss), ("channel_taylor",))
    dims = {"up": 1}
    reference = copy.deepcopy(model).eval()
    for name, _ in maps(reference, data[0][0]).items():
        total = 0.0
        layer = reference.get_submodule(name)
        for batch in data:
            reference.zero_grad()
            loss(reference, batch).backward()
            change = (layer.weight * layer.weight.grad).movedim(dims.get(name, 0), 0).flatten(1).sum(1)
            total = total + (change + (layer.bias * layer.bias.grad if layer.bias is not None else 0)) ** 2
        assert torch.allclose(
            found[f"{name}.weight"]["channel_taylor"].double(), total.detach() / len(data), rtol=1e-5
        ), name


def test_taylor_foretells_a_small_cut() -> None:
    """A channel that is scaled by 1 - e changes the loss by e times the root of its score."""
    model = net().double().eval()
    batch = (batches(1)[0][0].double(), batches(1)[0][1])
    found = secateur.calibrate(model, secateur.Calibration([batch], loss=loss), ("channel_taylor",))["pooled.weight"]
    before = float(loss(model, batch).detach())
    for channel in range(5):
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.pooled.weight[channel] *= 1 - 1e-6
            cut.pooled.bias[channel] *= 1 - 1e-6
        change = abs(float(loss(cut, batch).detach()) - before) / 1e-6
        assert change == pytest.approx(float(found["channel_taylor"][channel]) ** 0.5, rel=1e-3, abs=1e-9)


def hidden_loss(model: nn.Module, batch: Any) -> Tensor:
    hidden: Tensor = model(**batch).last_hidden_state
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)).tanh().sum((1, 2)).mean()


HEADS = {
    "bert": (pretrained("BertModel", **BERT | {"num_hidden_layers": 2}), 4, "attention.output.dense"),
    "llama": (pretrained("LlamaModel", **GROUPED | {"num_hidden_layers": 2}), 2, "o_proj"),
    "gpt2": (pretrained("GPT2Model", **GPT2 | {"n_layer": 2}), 4, "attn.c_proj"),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_gradients_are_outputs_times_gradients(name: str) -> None:
    """Of each single input, over a head's features and all positions, then the absolute value: in float64, by hand."""
    make, units, suffix = HEADS[name]
    model = make().double()
    g = torch.Generator().manual_seed(2)
    data = [{"input_ids": torch.randint(0, 50, (n, 6), generator=g)} for n in (2, 3)]
    calibration = secateur.Calibration(data, loss=hidden_loss)
    found = secateur.calibrate(model, calibration, ("head_gradient",), pattern="head:4")
    outs = {n: m for n, m in model.named_modules() if n.endswith(suffix)}
    assert len(outs) == 2 and len(found) == len(outs) * (2 if name == "gpt2" else 4)
    singles = [{"input_ids": row[None]} for batch in data for row in batch["input_ids"]]
    for path, module in outs.items():
        products = torch.stack([times_gradient(model, module, single) for single in singles])
        want = products.view(len(singles), units, -1).sum(2).abs().mean(0)
        own = found[f"{path}.weight"]["head_gradient"]
        per_head = own.reshape(units, -1).double()
        assert own.shape == ((24, 1) if name == "gpt2" else (1, 24))
        assert torch.allclose(per_head, (want / want.norm())[:, None].expand_as(per_head), rtol=1e-5), path
    criterion = secateur.criteria.head_importance
    report = secateur.prune(
        model, 0.5, criterion=criterion, calibration=calibration, pattern="head:4", allocation="uniform"
    )
    for path in outs:
        order = torch.argsort(found[f"{path}.weight"]["head_gradient"].reshape(units, -1)[:, 0])
        assert report[f"{path}.weight"].units == tuple(sorted(order[: units // 2].tolist()))


def times_gradient(model: nn.Module, module: nn.Module, batch: Any) -> Tensor:
    """Σ x · ∂loss/∂x over all positions, for each feature that comes into a module."""
    held: list[Tensor] = []

    def keep(m: nn.Module, args: Any) -> None:
        args[0].retain_grad()
        held.append(args[0])

    handle = module.register_forward_pre_hook(keep)
    hidden_loss(model, batch).backward()
    handle.remove()
    model.zero_grad()
    (x,) = held
    assert x.grad is not None
    return (x.detach() * x.grad).sum((0, 1))


def slope(model: nn.Module, module: nn.Module, batch: Any, head: int, units: int, step: float = 1e-5) -> float:
    """∂loss / ∂factor of one head at 1, by a central difference."""
    values = []
    for factor in (1 + step, 1 - step):

        def scaled(m: nn.Module, args: Any, factor: float = factor) -> Any:
            x = args[0].clone()
            size = x.shape[-1] // units
            x[..., head * size : (head + 1) * size] *= factor
            return (x, *args[1:])

        handle = module.register_forward_pre_hook(scaled)
        with torch.no_grad():
            values.append(float(hidden_loss(model, batch)))
        handle.remove()
    return (values[0] - values[1]) / (2 * step)


def test_shared_layers_add_up_their_gradients_before_the_absolute_value() -> None:
    """The derivative by a factor that all uses of a layer share, from differences of the loss of each input."""
    model = pretrained("AlbertModel", embedding_size=8, **BERT | {"num_hidden_layers": 2})().double()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    found = secateur.calibrate(
        model, secateur.Calibration([batch], loss=hidden_loss), ("head_gradient",), pattern="head:4"
    )
    (name,) = [n for n in found if n.endswith("attention.dense.weight")]
    module = model.get_submodule(name.removesuffix(".weight"))
    singles = [{"input_ids": row[None]} for row in batch["input_ids"]]
    want = torch.tensor(
        [sum(abs(slope(model, module, s, h, 4)) for s in singles) for h in range(4)], dtype=torch.float64
    )
    assert torch.allclose(found[name]["head_gradient"].view(4, -1)[:, 0].double(), want / want.norm(), rtol=1e-4)


# The model is left as it was, and what cannot be measured is refused.

ALL: dict[str, tuple[Callable[[], nn.Module], Sequence[str], Callable[..., Tensor], Callable[[], list[Any]], str]] = {
    "maps": (net, (*CHANNELS,), loss, batches, "unstructured"),
    "taylor": (net, ("channel_taylor",), loss, batches, "unstructured"),
    "heads": (
        HEADS["bert"][0], ("head_gradient",), hidden_loss, lambda: [{"input_ids": torch.arange(12).view(2, 6)}] * 2, "head:4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ALL)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(what: str, fails: bool) -> None:
    make, wanted, loss_, data, pattern = ALL[what]
    model = make().train()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
        p.grad = torch.full_like(p, 0.5) if i % 2 else None
    model.get_submodule("encoder" if what == "heads" else "bn").eval()
    before = whole_of(model)

    def broken(m: nn.Module, batch: Any) -> Tensor:
        if fails:
            loss_(m, batch)
            raise RuntimeError("the user's own")
        return loss_(m, batch)

    calibration = secateur.Calibration(data(), loss=broken, forward=broken)
    if fails:
        with pytest.raises(RuntimeError, match="the user's own"):
            secateur.calibrate(model, calibration, wanted, pattern=pattern)
    else:
        assert secateur.calibrate(model, calibration, wanted, pattern=pattern)
    assert whole_of(model) == before


@pytest.mark.parametrize("what", ALL)
def test_frozen_models_can_be_measured(what: str) -> None:
    make, wanted, loss_, data, pattern = ALL[what]
    free, frozen = make(), make().requires_grad_(False)
    measured = [
        secateur.calibrate(m, secateur.Calibration(data(), loss=loss_), wanted, pattern=pattern) for m in (free, frozen)
    ]
    assert all(torch.equal(t, measured[1][n][s]) for n, own in measured[0].items() for s, t in own.items())


@pytest.mark.parametrize("what", ["taylor", "heads"])
def test_models_that_are_compiled_can_be_measured(what: str) -> None:
    """Also by gradients of the second order, which compiled code does not have."""
    make, wanted, loss_, data, pattern = ALL[what]
    plain = make().eval()
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    for batch in data():
        loss_(compiled, batch).backward()  # which compiles both ways
    compiled.zero_grad()
    how, used = secateur.Calibration(data(), loss=loss_), "*attention.output.dense*" if what == "heads" else None
    one, other = (
        secateur.calibrate(m, how, (*wanted, "hessian_diag"), include=used, pattern=pattern) for m in (plain, compiled)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[n][s]) for n, own in one.items() for s, t in own.items())


def nan_batches(data: list[Any]) -> list[Any]:
    x, y = data[0]
    return [(x.clone().index_fill_(0, torch.tensor([1]), torch.nan), y)]


@pytest.mark.parametrize("what", ALL)
def test_no_batches_are_refused(what: str) -> None:
    make, wanted, loss_, _, pattern = ALL[what]
    with pytest.raises(BadInput, match="the calibration is empty"):
        secateur.calibrate(make(), secateur.Calibration([], loss=loss_), wanted, pattern=pattern)


def test_values_that_are_not_finite_are_refused() -> None:
    bad = secateur.Calibration(nan_batches(batches()), loss=loss)
    with pytest.raises(BadInput, match=r"the feature map of 'plain\.weight' .* holds NaN or infinite"):
        secateur.calibrate(net(), bad, CHANNELS)
    with pytest.raises(BadInput, match="the loss of batch 1 is nan"):
        secateur.calibrate(net(), bad, ("channel_taylor",))
    overflow = secateur.Calibration(batches(), loss=lambda m, b: (m(b[0]) * 0).sum().sqrt())
    with pytest.raises(BadInput, match="are NaN or infinite: look for a loss"):
        secateur.calibrate(net(), overflow, ("channel_taylor",))


LOSSES: list[tuple[Any, str]] = [
    (None, "made of gradients: say of which loss"),
    (lambda m, b: 1.0, "must return a tensor with one real number"),
    (lambda m, b: m(b[0]), "must return a tensor with one real number"),
    (lambda m, b: loss(m, b).detach(), "has no graph"),
]


@pytest.mark.parametrize(("wrong", "why"), LOSSES)
def test_losses_that_are_none_are_refused(wrong: Any, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        secateur.calibrate(net(), secateur.Calibration(batches(), loss=wrong), ("channel_taylor",))


def test_layers_that_no_batch_reaches_are_refused() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    x = [torch.randn(2, 3)]
    how = secateur.Calibration(x, forward=lambda m, b: m["used"](b), loss=lambda m, b: m["used"](b).mean())
    with pytest.raises(BadInput, match=r"no batch reached 'idle\.weight'"):
        secateur.calibrate(model, how, CHANNELS)
    with pytest.raises(BadInput, match=r"the loss does not depend on 'idle\.weight'"):
        secateur.calibrate(model, how, ("channel_taylor",))


def test_heads_that_cannot_be_measured_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    how = secateur.Calibration([torch.randn(2, 3, 8)], loss=lambda m, b: m(b).mean())
    with pytest.raises(BadInput, match=r"'self_attn\.out_proj\.weight' .* belongs to torch\.nn\.MultiheadAttention"):
        secateur.calibrate(layer, how, ("head_gradient",), pattern="head:4")
    with pytest.raises(BadInput, match=r'say how many a layer has, pattern="head:12"; got unstructured'):
        secateur.calibrate(layer, how, ("head_gradient",))
    bert = HEADS["bert"][0]()
    idle = secateur.Calibration([{"input_ids": torch.arange(4).view(1, 4)}], loss=lambda m, b: m.embeddings(**b).mean())
    with pytest.raises(BadInput, match="the loss does not depend on what comes into"):
        secateur.calibrate(bert, idle, ("head_gradient",), pattern="head:4")


def test_pruning_by_name_is_pruning_by_what_was_measured() -> None:
    """The whole way: data in, the channels that fire least out, with their biases."""
    model, other = net(), net()
    how = {"pattern": "channel", "allocation": "uniform", "include": ["plain", "pooled"]}
    found = secateur.calibrate(model, batches(), ("channel_activation",))
    secateur.prune(model, 0.5, criterion="mean_activation", calibration=batches(), **how)  # type: ignore[arg-type]
    secateur.prune(other, 0.5, criterion=mean_activation, statistics=found, **how)  # type: ignore[arg-type]
    for name, lost in (("plain", 2), ("pooled", 2)):
        order = torch.argsort(found[f"{name}.weight"]["channel_activation"])[:lost]
        for m in (model, other):
            layer = m.get_submodule(name)
            dead = (layer.weight == 0).flatten(1).all(1)
            assert sorted(order.tolist()) == dead.nonzero().view(-1).tolist()
            assert torch.equal(layer.bias == 0, dead)
