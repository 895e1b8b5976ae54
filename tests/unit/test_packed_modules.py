"""Packing a model and taking it back: states, copies, compilers, ties, hooks, memory, and what the report says."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from secateur.core.layouts import Layout
from secateur.errors import SecateurWarning
from secateur.runtime.files import save_packed
from secateur.runtime.inventory import packed_report
from secateur.runtime.layers import PackedLayer, PackedLinear
from secateur.runtime.load import load_packed
from secateur.runtime.modules import pack, unpack
from tests.unit.packed_nets import LAYOUTS, bits, net, sparse_, state
from tests.unit.tables_of import constant, table_of

layouts = pytest.mark.parametrize("layout", LAYOUTS)
X = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))


def out(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(X.to(next(p.dtype for p in model.state_dict().values() if p.is_floating_point())))
    return result


def packed(layout: Layout = "csr") -> nn.Module:
    return pack(net(), layout=layout)


def test_it_is_in_place_and_comes_back() -> None:
    model = net()
    before, modules, keys = state(model), [id(m) for m in model.modules()], list(model.state_dict())
    model[0].weight.requires_grad_(False)
    model[3].eval()
    want = out(model)
    assert pack(model, layout="bitmask") is model
    assert [id(m) for m in model.modules()] == modules
    assert [type(m) for m in model] == [PackedLinear, nn.ReLU, nn.LayerNorm, PackedLinear]
    assert [m.training for m in model] == [True, True, True, False]
    assert not any(p.requires_grad for n, p in model.named_parameters() if n[0] in "03")
    assert torch.allclose(out(model), want, atol=1e-5)
    assert unpack(model) is model
    assert [id(m) for m in model.modules()] == modules
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.LayerNorm, nn.Linear]
    assert state(model) == before
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True]
    assert [m.training for m in model] == [True, True, True, False]
    assert not [a for m in model.modules() for a in vars(m) if "packed" in a]
    model(X).sum().backward()
    assert model[3].weight.grad is not None
    assert state(unpack(model)) == before


def test_the_dense_weight_is_gone() -> None:
    model = net()
    gone = [weakref.ref(model[0].weight), weakref.ref(model[3].weight)]
    dense = sum(p.untyped_storage().nbytes() for p in model.parameters())
    pack(model, layout="csr")
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    tensors = [*model.parameters(), *model.buffers()]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert held < 0.5 * dense


@layouts
def test_a_state_goes_into_another_packed_model(layout: Layout, tmp_path: Path) -> None:
    model = packed(layout)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    file.seek(0)
    for n, found in enumerate((torch.load(file, weights_only=True), load_file(tmp_path / "state.safetensors"))):
        for other_layout in LAYOUTS:
            other = pack(sparse_(net(), 0.3, seed=7 + n), layout=other_layout)  # type: ignore[arg-type]
            with torch.no_grad():
                other[0].bias.add_(1)  # type: ignore[index, union-attr, operator]
            assert out(other).ne(out(model)).any()
            other.load_state_dict(found, strict=True)
            assert state(other) == state(model)
            assert torch.equal(out(other), out(model))
    dense = net()
    assert state(unpack(other)) == state(dense)


def test_a_state_is_taken_without_a_copy_where_asked() -> None:
    found = {k: t.clone() for k, t in packed().state_dict().items()}
    other = pack(sparse_(net(), 0.3, seed=7), layout="bitmask")
    other.load_state_dict(found, assign=True)
    assert other.get_buffer("0.packed_values").data_ptr() == found["0.packed_values"].data_ptr()
    other.load_state_dict(found)
    assert other.get_buffer("0.packed_values").data_ptr() != found["0.packed_values"].data_ptr()
    half = pack(net().half(), layout="csr")
    half.load_state_dict(found)
    assert half.get_buffer("0.packed_values").dtype == torch.float16


@layouts
def test_copies(layout: Layout) -> None:
    model = packed(layout)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies: list[nn.Module] = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    ]  # fmt: skip
    for other in copies:
        assert state(other) == state(model)
        assert torch.equal(out(other), out(model))
        assert state(unpack(other)) == state(net())
    assert model.get_buffer("0.packed_values").numel() > 0


def _answer(model: nn.Module, x: Tensor, answer: Tensor) -> None:
    with torch.inference_mode():
        answer.copy_(model(x))


def test_memory_is_shared() -> None:
    model = packed("csr")
    want = out(model)
    assert model.share_memory() is model
    assert all(t.is_shared() for t in model.state_dict().values())
    assert torch.equal(out(model), want)


@pytest.mark.slow
def test_another_process_runs_it() -> None:
    model, answer = packed("csr").share_memory(), torch.zeros(4, 50).share_memory_()
    process = torch.multiprocessing.get_context("spawn").Process(target=_answer, args=(model, X, answer))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.allclose(answer, out(model))


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_can_change(layout: Layout, dtype: torch.dtype) -> None:
    model, dense = packed(layout).to(dtype), net().to(dtype)
    assert [t.dtype for t in model.parameters()] == [dtype] * 3
    assert torch.allclose(out(model).float(), out(dense).float(), rtol=0.02, atol=0.02)
    assert state(unpack(model)) == state(dense)


def test_what_looks_at_the_weight() -> None:
    layer, dense = packed()[0], net()[0]  # type: ignore[index]
    w = layer.weight
    assert (w.shape, w.dtype, w.device, w.requires_grad, w.nbytes) == (
        (80, 96),
        torch.float32,
        torch.device("cpu"),
        False,
        30720,
    )
    assert repr(w) == "PackedWeight(shape=(80, 96), dtype=torch.float32)"
    assert isinstance(w, Tensor)
    assert not isinstance(w, nn.Parameter)
    assert torch.equal(w, dense.weight)
    assert torch.equal(w.data[3], dense.weight[3])
    assert torch.equal(X @ w.T, X @ dense.weight.T)
    assert torch.equal(copy.deepcopy(w), dense.weight)
    assert torch.equal(pickle.loads(pickle.dumps(w)), dense.weight)
    assert w.tolist() == dense.weight.tolist()
    assert (w.numpy() == dense.weight.detach().numpy()).all()
    assert type(w.clone()) is Tensor
    assert (layer.in_features, layer.out_features) == (96, 80)


def test_hooks_and_attributes_stay() -> None:
    model = net()
    seen = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append("before"))
    handle = model[0].register_forward_hook(lambda m, args, y: seen.append("after"))
    model[0].note = "mine"
    model[0].register_buffer("calls", torch.zeros(1))
    pack(model, layout="csr")
    out(model)
    assert seen == ["before", "after"]
    handle.remove()
    out(model)
    assert seen == ["before", "after", "before"]
    assert model[0].note == "mine"
    assert list(unpack(model)[0].state_dict()) == ["weight", "bias", "calls"]  # type: ignore[index]
    assert len(model[0]._forward_pre_hooks) == 1


class Tied(nn.Module):
    """A layer under two names, another that shares its weight and bias, and one that shares an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.again = self.a
        self.b = nn.Linear(64, 64)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.emb = nn.Embedding(50, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.b(self.a(self.emb(ids))))
        return result


@layouts
def test_ties(layout: Layout) -> None:
    model = sparse_(Tied()).eval()
    dense, ids = copy.deepcopy(model), torch.tensor([[1, 2, 3]])
    pack(model, layout=layout)
    assert model.again is model.a
    assert model.b.get_buffer("packed_values") is model.a.get_buffer("packed_values")
    assert model.head.weight is model.emb.weight
    report = packed_report(model)
    assert [r.name for r in report.packed] == ["a.weight"]
    assert report["emb.weight"].why == "its weight is also that of 'emb' (Embedding)"
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            assert torch.allclose(other(ids), dense(ids), atol=1e-4)
        unpack(other)
        assert other.a.weight is other.b.weight
        assert other.a.bias is other.b.bias
        assert other.head.weight is other.emb.weight
        assert state(other) == state(dense)


def test_the_choice_of_layers() -> None:
    def kinds(**how: Any) -> list[bool]:
        model = nn.Sequential(net(), nn.Linear(50, 4))
        return [
            isinstance(m, PackedLayer) for m in pack(model, layout="csr", **how).modules() if hasattr(m, "in_features")
        ]

    assert kinds() == [True, True, True]
    assert kinds(include="0") == [True, True, False]
    assert kinds(include=["0.0", "1.weight"]) == [True, False, True]
    assert kinds(ignore="0.*") == [False, False, True]
    assert kinds(include="0", ignore="0.3.weight") == [True, False, False]


def test_packing_a_packed_model_packs_what_is_left() -> None:
    model = pack(net(), include="0", layout="csr")
    before = bits(model.get_buffer("0.packed_values"))
    pack(model, layout="bitmask")
    assert [r.layout for r in packed_report(model).packed] == ["csr", "bitmask"]
    assert bits(model.get_buffer("0.packed_values")) == before
    assert pack(model, layout="csr") is model


def test_what_gains_nothing_stays_dense_and_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.warns(SecateurWarning, match="all 2 layers that could be packed stay dense. 0.weight: ") as told:
        pack(model)
    assert told[0].filename == __file__
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert packed_report(model)["0.weight"].why


def test_the_table_chooses(tmp_path: Path) -> None:
    def kinds(model: nn.Module) -> list[str | None]:
        return [m.packed_layout if isinstance(m, PackedLayer) else None for m in model]  # type: ignore[attr-defined]

    def make() -> nn.Sequential:
        layers = [
            nn.Linear(256, 256),
            nn.Linear(256, 256),
            nn.Linear(256, 64),
            nn.Conv2d(256, 256, 1),
            nn.Conv2d(256, 256, 1),
        ]
        return nn.Sequential(*(sparse_(m, d) for m, d in zip(layers, (0.05, 0.9, 0.05, 0.05, 0.05), strict=True)))

    table = table_of((constant(2.0), constant(1.5)), (constant(3.0), constant(1.5)))
    model = pack(make(), table=table)
    assert kinds(model) == ["csr", None, None, None, None]
    told = packed_report(model, table=table)
    assert "is not zero; gains were looked for up to 50%" in told["1.weight"].why
    assert "smaller than what was measured" in told["2.weight"].why
    assert "the size of its images" in told["3.weight"].why
    # A convolution that is named in full is packed; the other is not. What is packed already stays so.
    assert kinds(pack(model, include=["3.weight", "4"], table=table)) == ["csr", None, None, "csr", None]
    save_packed(make(), tmp_path / "m.safetensors")
    assert kinds(load_packed(tmp_path / "m.safetensors", make(), table=table)) == ["csr", None, None, None, None]


def test_the_report() -> None:
    model = nn.Sequential(net(), nn.Conv2d(3, 3, 3), nn.Embedding(5, 5))
    dense = packed_report(model)
    assert dense.packed == ()
    assert dense.nbytes == dense.dense_nbytes == sum(p.nbytes for p in model.parameters())
    pack(model, layout="bitmask")
    report = packed_report(model)
    row, layer = report["0.0.weight"], model[0][0]  # type: ignore[index]
    assert (row.shape, row.dtype, row.layout, row.dense_nbytes) == ((80, 96), "float32", "bitmask", 80 * 96 * 4)
    assert row.nbytes == sum(b.nbytes for b in layer.buffers())
    assert row.stored == int(net()[0].weight.count_nonzero())
    assert row.sparsity == 1 - row.stored / 7680
    assert row.bits == 8 * row.nbytes / 7680
    assert f"layout=bitmask, {row.bits:.3g} bits a weight" in repr(layer)
    assert report.dense_nbytes == dense.nbytes
    assert report.nbytes == sum(t.nbytes for t in model.state_dict().values())
    assert {r.name: r.why for r in report if r.layout is None and len(r.shape) > 1} == {
        "1.weight": "a convolution that is not 1×1, or is grouped or padded", "2.weight": "an embedding"
    }  # fmt: skip
    assert "0.0.weight  80x96" in str(report)
    assert "2 of 8 parameters packed" in str(report)
    assert "dense: a bias (3)" in str(report)
    with pytest.raises(KeyError):
        report["none"]


def test_what_prunes_sees_that_it_is_packed() -> None:
    model = packed()
    for call in (lambda: secateur.prune(model, 0.9), lambda: secateur.masks(model), lambda: secateur.plan(model, 0.9)):
        with pytest.raises(secateur.BadTensor, match=r"'0.weight' .* is packed; .* secateur.unpack\(model\)"):
            call()
    with pytest.raises(secateur.BadInput, match="'0' is packed"):
        secateur.count_flops(model, X)
    assert secateur.inspect(model)["0.weight"].zeros is None
    assert secateur.prune(unpack(model), 0.9).sparsity == pytest.approx(0.9, abs=1e-3)


# What torch's own tools say of torch.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@layouts
def test_compiled_and_exported(layout: Layout) -> None:
    torch._dynamo.reset()
    model, dense = packed(layout), net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(X), dense(X), atol=1e-5)
        assert torch.allclose(compiled(X[:1]), dense(X[:1]), atol=1e-5)
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    with torch.no_grad():
        assert torch.allclose(loaded.module()(X[:3]), dense(X[:3]), atol=1e-5)
    assert {"0.packed_values", "0.packed_starts"} <= set(loaded.state_dict)

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model[0]  # type: ignore[index]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype)) + self.layer.weight.sum()

    with torch.inference_mode():
        looks = torch.compile(Looks(), fullgraph=True, backend="aot_eager")(X.double())
        assert torch.allclose(looks, dense[0](X) + dense[0].weight.sum(), atol=1e-4)


@pytest.mark.slow
@layouts
@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")
def test_compiled_by_inductor(layout: Layout) -> None:
    torch._dynamo.reset()
    model, dense = packed(layout), net()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        assert torch.allclose(compiled(X), dense(X), atol=1e-5)
