"""What is refused or left dense when a model is packed, and what cannot be done with a packed one; with nothing touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import secateur
from secateur.errors import BadInput, BadTensor, NotDefined, NothingChosen
from secateur.runtime import modules
from secateur.runtime.inventory import packed_report
from secateur.runtime.layers import PackedLayer, PackedLinear
from secateur.runtime.modules import pack, unpack
from tests.contract.nets import outside
from tests.unit.packed_nets import net, sparse_, state

X = torch.randn(2, 96)


class OwnForward(nn.Linear):
    """Does something else than a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnMethod(nn.Linear):
    """Has something that others may call."""

    def scale(self) -> Tensor:
        return self.weight.abs().max()


class Plain(nn.Linear):
    """Differs in how it is made only."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.size = size

    def extra_repr(self) -> str:
        return f"{self.size}"


def replaced() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def masked(name: str) -> nn.Module:
    return prune.random_unstructured(nn.Linear(32, 32), name, amount=0.5)


def tied_to(other: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), other)
    model[0].weight = other.weight  # type: ignore[assignment]
    return model


class Meddled(nn.Module):
    """Holds a layer's weight itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.own = self.fc.weight


def of_peft() -> nn.Module:
    wrapper = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    wrapper.base_layer = nn.Linear(32, 32)
    return wrapper


def with_bias(bias: Tensor) -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.bias = nn.Parameter(bias)
    return layer


def transposed(columns: int = 32) -> nn.Module:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    layer: nn.Module = conv1d(32, columns)
    return layer


# A model, and why its first weight stays dense.
DENSE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "its own forward": (lambda: OwnForward(32, 32), "its class OwnForward defines forward"),
    "a method of its own": (lambda: OwnMethod(32, 32), "its class OwnMethod defines scale"),
    "a forward put on it": (replaced, "its forward was replaced"),
    "under torch's prune": (lambda: masked("weight"), "still under torch.nn.utils.prune"),
    "its bias under prune": (lambda: masked("bias"), "its bias is no plain parameter"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(32, 32)), "computed by a parametrisation"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(32, 32)), "computed by spectral_norm"),
    "an embedding's weight": (lambda: tied_to(nn.Embedding(32, 32)), "its weight is also that of 'this.1' (Embedding)"),
    "another's in another way": (lambda: tied_to(transposed()), "'this.0' and 'this.1', which use it in different ways"),
    "its parent's weight": (Meddled, "its weight is also that of 'this' (Meddled)"),
    "attention": (lambda: nn.MultiheadAttention(32, 4), "nn.MultiheadAttention reads its weight instead of calling it"),
    "an adapter of peft": (of_peft, "under an adapter of peft"),
    "float64": (lambda: nn.Linear(32, 32).double(), "it is float64; packed layers are float32, bfloat16 or float16"),
    "a bias of another dtype": (lambda: with_bias(torch.zeros(32).half()), "its bias has another type, dtype or device"),
    "lazy": (lambda: nn.LazyLinear(32), "it is lazy and has no shape yet"),
    "empty": (lambda: nn.Linear(0, 32), "it has no elements"),
    "a kernel": (lambda: nn.Conv2d(32, 32, 3), "a convolution that is not 1×1, or is grouped or padded"),
    "groups": (lambda: nn.Conv2d(32, 32, 1, groups=2), "a convolution that is not 1×1, or is grouped or padded"),
    "padding": (lambda: nn.Conv1d(32, 32, 1, padding=1), "a convolution that is not 1×1, or is grouped or padded"),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(32, 32, 1), "not the weight of a linear layer"),
    "recurrent": (lambda: nn.LSTM(32, 32), "not the weight of a linear layer"),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), "not the weight of a linear layer"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("case", DENSE)
def test_it_stays_dense_and_the_report_says_why(case: str) -> None:
    make, why = DENSE[case]
    model = nn.ModuleDict({"other": nn.Linear(16, 16), "this": make()})
    told = [r.why for r in packed_report(model) if r.name.startswith("this.")]
    assert any(why in w for w in told), told
    pack(model, layout="csr")
    assert [n for n, m in model.named_modules() if isinstance(m, PackedLayer)] == ["other"]
    name = next(r.name for r in packed_report(model) if r.name.startswith("this.") and why in r.why)
    before = outside(model) if case != "lazy" else None
    with pytest.raises(BadInput) as e:
        pack(model, include=name, layout="csr")
    assert str(e.value).startswith(f"cannot pack '{name}'")
    assert why in str(e.value)
    assert before is None or outside(model) == before


def test_subclasses_that_do_what_their_base_does() -> None:
    model = sparse_(nn.Sequential(Plain(32), nn.MultiheadAttention(32, 4).out_proj))
    dense, x = copy.deepcopy(model), torch.randn(2, 32)
    pack(model, layout="csr")
    assert [type(m) for m in model] == [PackedLinear, PackedLinear]
    assert model[0].size == 32
    with torch.inference_mode():
        assert torch.allclose(model(x), dense(x), atol=1e-6)
    assert [type(m) for m in unpack(model)] == [type(m) for m in dense]  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a path": (BadInput, "pack takes an nn.Module and changes it in place; got a str", lambda: pack("model")),  # type: ignore[arg-type]
    "a dict": (BadInput, "got a OrderedDict", lambda: pack(net().state_dict())),  # type: ignore[arg-type]
    "unpack of a dict": (BadInput, "unpack takes an nn.Module", lambda: unpack({})),  # type: ignore[arg-type]
    "the report of a dict": (BadInput, "packed_report takes an nn.Module", lambda: packed_report({})),  # type: ignore[arg-type]
    "no such layout": (BadInput, "layout='coo': give one of bitmask, csr", lambda: pack(net(), layout="coo")),  # type: ignore[arg-type]
    "a filter that matches nothing": (NothingChosen, "include='fc' matches nothing", lambda: pack(net(), include="fc")),
    "no parameters": (NothingChosen, "no parameters", lambda: pack(nn.ReLU())),
    "nothing that can be": (NothingChosen, "nothing to pack .weight: an embedding", lambda: pack(nn.Embedding(3, 3))),
    "nothing but what is ignored": (NothingChosen, "nothing to pack .*ignored", lambda: pack(net(), ignore="*")),
    "on meta": (BadTensor, "'0.weight' .* meta device and has no values", lambda: pack(nn.Sequential(net()[0].to("meta")))),
    "too wide for csr": (NotDefined, "more than 65,536 inputs", lambda: pack(nn.Linear(65537, 1), layout="csr")),
    "packed by name twice": (
        BadInput, "'0.weight' .* it is packed already", lambda: pack(pack(net(), layout="csr"), include="0.weight")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, text, call = REFUSED[case]
    with pytest.raises(error, match=text) as e:
        call()
    assert type(e.value) is error


def test_one_that_is_refused_leaves_all_as_they_were() -> None:
    first = net()
    model = nn.Sequential(first, nn.Linear(50, 5, device="meta"))
    before = outside(first)
    with pytest.raises(BadTensor, match=r"'1.weight'"):
        pack(model, layout="csr")
    assert outside(first) == before


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before, calls = state(model), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return arranged(*args)

    arranged = modules.arranged
    monkeypatch.setattr(modules, "arranged", fails)
    with pytest.raises(MemoryError):
        pack(model, layout="csr")
    assert len(calls) == 2
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.LayerNorm, nn.Linear]
    assert state(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_training_is_refused_and_says_the_way_back() -> None:
    model = pack(net(), layout="csr")
    assert model.train().training
    with pytest.raises(NotDefined, match=r"secateur.unpack\(model\)"):
        model(X)  # the norm asks for gradients
    model.requires_grad_(False)
    assert not model(X).requires_grad
    with pytest.raises(NotDefined, match=r"secateur.unpack\(model\)"):
        model(X.clone().requires_grad_())
    model.requires_grad_(True)
    with pytest.raises(NotDefined, match=r"secateur.unpack\(model\)"):
        model[0](X)  # type: ignore[index, operator]
    with torch.no_grad():
        model(X.clone().requires_grad_())


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "of its data": lambda layer: layer.weight.data.zero_(),
    "a copy into it": lambda layer: layer.weight.copy_(torch.zeros(80, 96)),
    "an initialisation": lambda layer: nn.init.normal_(layer.weight),
    "as an output": lambda layer: torch.add(torch.zeros(80, 96), 1, out=layer.weight),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(80, 96))),
    "a new tensor": lambda layer: setattr(layer, "weight", torch.zeros(80, 96)),
}


@pytest.mark.parametrize("case", WRITES)
def test_its_weight_cannot_be_written(case: str) -> None:
    layer = pack(net(), layout="csr")[0]  # type: ignore[index]
    before = state(layer)
    with pytest.raises(NotDefined, match=r"secateur.unpack\(model\)"):
        WRITES[case](layer)
    assert state(layer) == before


MOVES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "to meta": (lambda m: m.to("meta"), "run on the CPU, and cannot go to meta"),
    "to float64": (lambda m: m.double(), "cannot become float64"),
    "to nothing": (lambda m: m.to_empty(device="cpu"), "cannot be emptied"),
    "to nothing elsewhere": (lambda m: m.to_empty(device="meta"), "cannot go to meta"),
}


@pytest.mark.parametrize("case", MOVES)
def test_it_cannot_go_everywhere(case: str) -> None:
    move, text = MOVES[case]
    model = pack(net(), layout="csr")
    before = state(model)
    with pytest.raises(NotDefined, match=text):
        move(model)
    assert {k: v for k, v in state(model).items() if k[0] in "03"} == {k: v for k, v in before.items() if k[0] in "03"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_is_refused() -> None:
    model = pack(net(), layout="csr")
    with pytest.raises(NotDefined, match="cannot go to cuda"):
        model.cuda()
    with pytest.raises(BadInput, match=r"run on the CPU"):
        model[0](X.cuda())  # type: ignore[index, operator]
    with pytest.raises(BadTensor, match="it is on cuda"):
        pack(net().cuda(), layout="csr")


def part(name: str, change: Callable[[Tensor], Any], layout: str = "csr") -> Callable[[dict[str, Tensor]], Any]:
    """Changes one part of the first layer."""

    def changed(found: dict[str, Tensor]) -> None:
        t = found[f"0.packed_{name}"].clone()
        made = change(t)
        found[f"0.packed_{name}"] = t if made is None else made

    return changed


def put(at: int, value: int) -> Callable[[Tensor], None]:
    """Writes a number in a part."""

    def change(t: Tensor) -> None:
        t.view(-1)[at] = value

    return change


def swapped(t: Tensor) -> Tensor:
    t = t.to(torch.int32)
    return torch.cat([t[1:2], t[:1], t[2:]]).to(torch.uint16)


def also(found: dict[str, Any], name: str, part: Any) -> None:
    found[f"0.packed_{name}"] = part


def anothers(found: dict[str, Any]) -> None:
    found |= {k: found["3" + k[1:]] for k in found if k.startswith("0.packed")}


BAD_STATES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "a start past the end": ("csr", part("starts", put(3, 1 << 40)), "do not rise from 0"),
    "a start below 0": ("csr", part("starts", put(0, -1)), "do not rise from 0"),
    "another last start": ("csr", part("starts", put(-1, 5)), "do not rise from 0"),
    "too few starts": ("csr", part("starts", lambda t: t[:-1]), r"starts are .* of shape \(81,\)"),
    "starts in 32 bits": ("csr", part("starts", lambda t: t.int()), "starts are contiguous int64"),
    "starts in steps": ("csr", part("starts", lambda t: torch.cat([t, t])[::2].contiguous()), "do not rise"),
    "a column too far": ("csr", part("columns", put(4, 96)), "in column 96 of a matrix of 96 columns"),
    "columns that fall": ("csr", part("columns", swapped), "the columns of a row do not rise"),
    "a column twice": ("csr", part("columns", lambda t: torch.cat([t[:1], t[:1], t[2:]])), "do not rise"),
    "a column past the end": ("csr", part("columns", put(-1, 7)), "do not end in 64 zeros"),
    "too few columns": ("csr", part("columns", lambda t: t[:-1]), "columns are contiguous uint16"),
    "signed columns": ("csr", part("columns", lambda t: t.view(torch.int16)), "columns are contiguous uint16"),
    "a value too many": ("csr", part("values", lambda t: torch.cat([t, t[-1:]])), r"columns are .* of shape \(\d+,\)"),
    "values that end in none": ("csr", part("values", put(-1, 3)), "do not end in 64 zeros"),
    "no values": ("csr", part("values", lambda t: t[:0]), "64 of them at least"),
    "values in rows": ("csr", part("values", lambda t: t[None]), "values are .* in one dim"),
    "a bit more": ("bitmask", part("bits", lambda t: t | (torch.arange(16) < 12)), "another number of bits than of values"),
    "a bit elsewhere": ("bitmask", part("bits", lambda t: t.roll(1, 0)), "another number of bits than of values"),
    "bits past the last column": ("bitmask", part("bits", put(15, 1)), "set past the last of 96 columns"),
    "bits for fewer columns": ("bitmask", part("bits", lambda t: t[:, :8].contiguous()), r"bits are .* \(80, 16\)"),
    "bits as bools": ("bitmask", part("bits", lambda t: t.bool()), "bits are contiguous uint8"),
    "no bits": ("bitmask", lambda found: found.pop("0.packed_bits"), "there are .'packed_starts', 'packed_values'"),
    "both layouts": ("bitmask", lambda found: also(found, "columns", found["0.packed_bits"]), "one of packed_bits and"),
    "values on meta": ("csr", part("values", lambda t: t.to("meta")), "on the CPU"),
    "a dense weight": ("csr", lambda found: found.update({"0.weight": torch.zeros(80, 96)}), "0.weight is dense, and"),
    "no tensor": ("csr", lambda found: also(found, "values", [1.0]), "it takes packed_values"),
    "another layer's": ("csr", anothers, r"\(81,\)"),
}  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_contradicts_itself_is_refused(case: str, strict: bool, assign: bool) -> None:
    layout, change, text = BAD_STATES[case]
    found: Any = dict(pack(net(), layout=layout).state_dict())  # type: ignore[arg-type]
    change(found)
    model = pack(sparse_(net(), 0.1, seed=3), layout="csr")
    before = state(model[0])  # type: ignore[index]
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict(found, strict=strict, assign=assign)
    after = state(model[0])  # type: ignore[index]
    assert {k: v for k, v in after.items() if k != "bias"} == {k: v for k, v in before.items() if k != "bias"}


def test_what_a_state_lacks_is_told() -> None:
    model = pack(net(), layout="csr")
    found = {k: t for k, t in model.state_dict().items() if not k.startswith("0.packed")}
    with pytest.raises(
        RuntimeError, match=r"Missing key.* \"0.packed_columns\", \"0.packed_values\", \"0.packed_starts\""
    ):
        model.load_state_dict(found)
    assert model.load_state_dict(found, strict=False).missing_keys == [
        "0.packed_columns", "0.packed_values", "0.packed_starts"
    ]  # fmt: skip
    found = dict(model.state_dict()) | {"0.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"0.other\""):
        model.load_state_dict(found)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.bias"):
        model.load_state_dict(dict(model.state_dict()) | {"0.bias": torch.zeros(3)})


def test_a_convolution_refuses_what_a_convolution_refuses() -> None:
    layer = pack(sparse_(nn.Conv2d(16, 16, 1)), layout="csr")
    for shape in ((2, 16), (1, 2, 16, 4, 4), (2, 15, 4, 4)):
        with pytest.raises(BadInput, match=r"dims|features"), torch.no_grad():
            layer(torch.zeros(shape))


def test_packed_layers_are_not_pruned_again() -> None:
    with pytest.raises(secateur.BadTensor, match="it is packed"):
        secateur.prune(pack(net(), layout="csr"), 0.9, include="0.weight")


def test_a_packed_model_is_no_source_of_a_file(tmp_path: Path) -> None:
    """Its buffers would be stored as any other tensors, and no model could be filled with them."""
    model = pack(net(), layout="csr")
    with pytest.raises(secateur.BadInput, match=r"'0' is packed .*secateur\.unpack\(model\)"):
        secateur.save_packed(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    assert secateur.save_packed(secateur.unpack(model), tmp_path / "model.safetensors").rows
