"""Packed files into models: with and without values, tied, wrapped, in every encoding; and everything that is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.core.layouts import Layout
from secateur.errors import BadInput, BadTensor, SecateurWarning
from secateur.runtime.files import save_packed
from secateur.runtime.layers import PackedLayer
from secateur.runtime.load import from_packed, load_packed
from secateur.runtime.modules import pack, unpack
from secateur.runtime.unfilled import unfilled
from tests.unit.packed_nets import LAYOUTS, net, sparse_, state
from tests.unit.test_packed_modules import Tied

layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Buffered(nn.Module):
    """Layers, and buffers of both kinds."""

    scale: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.conv = sparse_(nn.Conv2d(8, 6, 1))
        self.register_buffer("scale", torch.full((1,), 3.0))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def kinds(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, PackedLayer)]


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with unfilled():
        return make()


@layouts
@pytest.mark.parametrize("how", [lambda make: make(), meta, built], ids=["with values", "on meta", "unfilled"])
def test_a_model_is_filled_and_packed(how: Any, layout: Layout, tmp_path: Path) -> None:
    want = sparse_(nn.Sequential(nn.Linear(96, 80), nn.LayerNorm(80), nn.Conv1d(80, 30, 1, bias=False)), seed=5)
    save_packed(want, tmp_path / "m.safetensors")
    model = how(lambda: nn.Sequential(nn.Linear(96, 80), nn.LayerNorm(80), nn.Conv1d(80, 30, 1, bias=False)))
    assert load_packed(tmp_path / "m.safetensors", model, layout=layout) is model
    assert kinds(model) == ["0", "2"]
    assert state(model) == state(pack(copy.deepcopy(want), layout=layout))
    assert state(unpack(model)) == state(want)
    assert all(p.requires_grad for p in model.parameters())


def test_what_no_layout_is_chosen_for_is_dense(tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(32, 32), sparse_(nn.Linear(32, 32).double()))
    save_packed(want, tmp_path / "m.safetensors")
    with pytest.warns(SecateurWarning, match=r"all 1 layers that could be packed stay dense. 0.weight: ") as told:
        model = load_packed(
            tmp_path / "m.safetensors", meta(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
        )
    assert told[0].filename == __file__
    assert kinds(model) == []
    assert state(model) == state(want)
    forced = meta(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    assert kinds(load_packed(tmp_path / "m.safetensors", forced, layout="csr")) == ["0"]  # float64 is not packed


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_file_says_the_dtype(layout: Layout, dtype: torch.dtype, tmp_path: Path) -> None:
    want = net().to(dtype)
    save_packed(want, tmp_path / "m.safetensors")
    model = load_packed(tmp_path / "m.safetensors", net(), layout=layout)
    assert {t.dtype for t in model.parameters()} == {dtype}
    assert state(unpack(model)) == state(want)


def test_a_bias_of_another_dtype_keeps_its_layer_dense(tmp_path: Path) -> None:
    want = net().half()
    want[0].bias.data = want[0].bias.data.float()
    save_packed(want, tmp_path / "m.safetensors")
    assert kinds(load_packed(tmp_path / "m.safetensors", meta(net), layout="csr")) == ["3"]


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_every_encoding(codec: str | None, tmp_path: Path) -> None:
    if codec is not None:
        pytest.importorskip("zstandard")
    want = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))
    for layer, density in zip(want, (0.01, 0.3, 1.0, 0.5), strict=True):
        sparse_(layer, density)
    want[3].weight.data = want[3].weight.data.fill_(1).view(-1, 4).mul(torch.tensor([1.0, 0, 1, 0])).view(256, 256)  # type: ignore[union-attr, operator]
    report = save_packed(want, tmp_path / "m.safetensors", codec=codec)
    if codec is None:
        assert {r.encoding for r in report.rows} == {"csr-u16", "bitmask", "dense", "2:4"}
    for layout in LAYOUTS:
        model = load_packed(tmp_path / "m.safetensors", meta(lambda: copy.deepcopy(want)), layout=layout)  # type: ignore[arg-type]
        assert len(kinds(model)) == 4
        assert state(model) == state(pack(copy.deepcopy(want), layout=layout))  # type: ignore[arg-type]


def test_ties_and_buffers(tmp_path: Path) -> None:
    for make in (Tied, Buffered):
        want = sparse_(make())
        save_packed(want, tmp_path / f"{make.__name__}.safetensors")
        for how in (built, lambda make: make()):
            model = load_packed(tmp_path / f"{make.__name__}.safetensors", how(make), layout="csr")
            assert state(unpack(model)) == state(want)
            if isinstance(model, Tied):
                assert model.head.weight is model.emb.weight
                assert model.a.weight is model.b.weight
            else:
                assert torch.equal(model.table, torch.arange(4.0))  # type: ignore[arg-type]
    model = Tied()  # the file names the tied ones too, for a model that does not tie them
    model.head.weight = nn.Parameter(torch.zeros(50, 64))
    load_packed(tmp_path / "Tied.safetensors", model, layout="csr")
    assert torch.equal(model.head.weight, model.emb.weight)
    assert kinds(model) == ["a", "b", "head"]


def test_a_wrapped_model_has_the_same_names(tmp_path: Path) -> None:
    want = net()
    save_packed(torch.compile(want, backend="eager"), tmp_path / "m.safetensors")
    model = meta(net)
    load_packed(tmp_path / "m.safetensors", torch.compile(model, backend="eager"), layout="csr")  # type: ignore[arg-type]
    assert state(unpack(model)) == state(want)


def with_file(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    """Loads the file of a dict that was changed."""

    def call(folder: Path) -> Any:
        tensors = dict(net().state_dict())
        change(tensors)
        save_packed(tensors, folder / "m.safetensors")
        return load_packed(folder / "m.safetensors", FILLED, layout="csr")

    return call


def plain(folder: Path) -> Any:
    save_file(net().state_dict(), folder / "plain.safetensors")
    return load_packed(folder / "plain.safetensors", FILLED)


def into(make: Callable[[], Any], of: Callable[[], nn.Module] = net, **how: Any) -> Callable[[Path], Any]:
    """Loads a file into another model."""

    def call(folder: Path) -> Any:
        save_packed(of(), folder / "m.safetensors")
        return load_packed(folder / "m.safetensors", make(), **how)

    return call


def meddled(folder: Path) -> Any:
    save_packed(net(), folder / "m.safetensors")
    found = load_file(folder / "m.safetensors")
    found["3.weight.bits"][0, 0] ^= 255
    with (folder / "m.safetensors").open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    save_file(found, folder / "m.safetensors", metadata=header["__metadata__"])
    return load_packed(folder / "m.safetensors", FILLED, layout="csr")


FILLED = sparse_(net(), 0.7, seed=11)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[Path], Any]]] = {
    "no module": (BadInput, "load_packed takes an nn.Module", into(dict)),
    "no such layout": (BadInput, "layout='coo'", into(net, layout="coo")),
    "no such file": (BadInput, "does not exist", lambda folder: load_packed(folder / "none", FILLED)),
    "not packed": (BadInput, "is not packed", plain),
    "a tensor too few": (BadInput, r"'3.weight' \(50, 80\) is in the model alone", with_file(lambda d: d.pop("3.weight"))),
    "a tensor too many": (
        BadInput, "'more' in the file alone", with_file(lambda d: d.update(more=torch.ones(3)))
    ),
    "another shape": (
        BadInput, r"'0.bias' is \(80,\) in the model and \(81,\) in the file",
        with_file(lambda d: d.update({"0.bias": torch.ones(81)})),
    ),
    "packed already": (BadInput, r"'0' is packed .*secateur\.unpack\(model\)", into(lambda: pack(net(), layout="csr"))),
    "lazy": (BadTensor, "'weight': it is lazy", into(lambda: nn.LazyLinear(3))),
    "a file that lies": (BadInput, "'3.weight'", meddled),
    "a buffer without values": (
        BadTensor, r"the buffers 'table' have no values, .*unfilled\(\)", into(lambda: meta(Buffered), Buffered)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_touched(case: str, tmp_path: Path) -> None:
    error, text, call = REFUSED[case]
    before = state(FILLED)
    with pytest.raises(error, match=text) as e:
        call(tmp_path)
    assert type(e.value) is error
    assert state(FILLED) == before
    assert kinds(FILLED) == []


def test_tied_tensors_that_a_file_holds_twice(tmp_path: Path) -> None:
    want = sparse_(Tied())
    twice = {k: t.clone() for k, t in want.state_dict().items()}
    save_packed(twice, tmp_path / "same.safetensors")
    assert state(unpack(load_packed(tmp_path / "same.safetensors", Tied(), layout="csr"))) == state(want)
    twice["head.weight"][3, 3] += 1
    save_packed(twice, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"'emb.weight' and 'head.weight' are one tensor in the model, and differ"):
        load_packed(tmp_path / "other.safetensors", Tied(), layout="csr")


def test_buffers_that_older_files_hold_are_left(tmp_path: Path) -> None:
    want = sparse_(Buffered())
    save_packed(dict(want.state_dict()) | {"table": torch.zeros(4)}, tmp_path / "m.safetensors")
    model = load_packed(tmp_path / "m.safetensors", Buffered(), layout="csr")
    assert torch.equal(model.table, torch.arange(4.0))  # type: ignore[arg-type]


def test_folders_without_a_config_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "dense").mkdir()
    save_file(net().state_dict(), tmp_path / "dense" / "model.safetensors")
    save_packed(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(BadInput, match=r"has no config.json"):
        from_packed(tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "none"}')
    with pytest.raises(BadInput, match=r"transformers cannot build the model of "):
        from_packed(tmp_path / "packed")
