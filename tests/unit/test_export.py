"""Exporting: safetensors with the zeros in it, and what is refused before anything is written."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import secateur
from secateur.errors import BadInput, BadTensor, NotDefined, NothingChosen, OutputExists, SecateurError
from secateur.runtime.export import FORMATS, OPTIONS, export
from secateur.runtime.exporters.semi_structured import broken, why_not
from tests.unit.refusals import net, state


class Tied(nn.Module):
    """A table that is also the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.words(x)))
        return out


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -------------------------------------------------------------------------------------- safetensors


def test_a_module_comes_back(tmp_path: Path) -> None:
    model = net()
    report = secateur.prune(model, 0.5)
    before = state(model)
    made = export(model, tmp_path / "model.safetensors", "safetensors")
    fresh = net()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert state(fresh) == before == state(model)
    assert (made.zeros, made.total) == (report.zeros, report.total) == (18, 36)
    assert made.sparsity == 0.5
    assert made.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert made.path == str(tmp_path / "model.safetensors")
    assert "18 of 36 weights zero" in str(made) and "as large as the dense model's" in str(made)


def test_every_bit_of_every_dtype_is_kept(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, -0.0, 1.5, float("nan")], [float("inf"), -2.0, 0.0, 1e-3]])
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    tensors = {f"{str(k)[6:]}.weight": values.to(k) for k in kinds}
    tensors |= {"steps": torch.tensor(7), "mask": torch.tensor([True, False]), "empty": torch.empty(0, 3)}
    made = export(tensors, tmp_path / "t.safetensors", "safetensors")
    found = load_file(tmp_path / "t.safetensors")
    assert {n: (t.dtype, t.shape, bits(t)) for n, t in found.items()} == {
        n: (t.dtype, t.shape, bits(t)) for n, t in tensors.items()
    }
    assert made.facts["tensors"] == len(tensors)


def test_tied_tensors_are_written_once_and_are_tied_again(tmp_path: Path) -> None:
    model = Tied()
    made = export(model, tmp_path / "m.safetensors", "safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert "head.weight" not in file.keys() and "words.weight" in file.keys()
        assert file.metadata()["head.weight"] == "words.weight"
    assert made.facts["tied"] == {"head.weight": "words.weight"}
    fresh = Tied()
    load_model(fresh, tmp_path / "m.safetensors")
    assert state(fresh) == state(model)
    assert fresh.head.weight is fresh.words.weight


def test_wrappers_are_no_part_of_a_name(tmp_path: Path) -> None:
    model = net()
    export(torch.compile(model, backend="eager"), tmp_path / "m.safetensors", "safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys()


def test_views_of_one_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"a.weight": whole[:2], "b.weight": whole[1:], "c.weight": whole.t()}
    export(tensors, tmp_path / "t.safetensors", "safetensors")
    found = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_what_is_there_stays_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    export(net(), path, "safetensors")
    before = path.read_bytes()
    with pytest.raises(OutputExists):
        export({"w": torch.ones(2, 2)}, path, "safetensors")
    assert path.read_bytes() == before
    export({"w": torch.ones(2, 2)}, path, "safetensors", overwrite=True)
    assert load_file(path).keys() == {"w"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# ----------------------------------------------------------------------------------------- refusals


def masked() -> nn.Module:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrised() -> nn.Module:
    model = net()
    parametrizations.weight_norm(model[0])
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def packed() -> nn.Module:
    return secateur.pack(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), include="1", layout="csr")


def sparse() -> dict[str, Tensor]:
    return {"a.weight": torch.eye(3).to_sparse()}


TARGETS: dict[str, tuple[Any, type[Exception], str]] = {
    "a path": ("model.safetensors", BadInput, "nn.Module or a dict of tensors, got a str"),
    "a tensor": (torch.ones(2, 2), BadInput, "got a Tensor"),
    "nothing in it": (nn.ReLU(), NothingChosen, "no parameters"),
    "no tensor": ({"a": 3}, BadInput, "'a' is a"),
    "under torch.nn.utils.prune": (masked(), BadTensor, "from_torch_prune"),
    "parametrised": (parametrised(), BadTensor, "remove_parametrizations"),
    "on meta": (nn.Linear(2, 2, device="meta"), BadTensor, "meta device"),
    "lazy": (lazy(), BadTensor, "run a forward pass first"),
    "sparse": (sparse(), BadTensor, "to_dense"),
    "packed": (packed(), BadInput, r"'1' is packed .* secateur\.unpack\(model\)"),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_that_no_format_holds(target: str, format: Any, tmp_path: Path) -> None:
    model, error, text = TARGETS[target]
    path = None if format == "semi-structured" else tmp_path / ("folder" if format == "openvino" else f"m.{format}")
    with pytest.raises(error, match=text) as e:
        export(model, path, format, torch.ones(1, 4))
    assert isinstance(e.value, SecateurError)
    assert not list(tmp_path.iterdir())


X = torch.ones(2, 4)
CALLS: dict[str, tuple[Any, str, dict[str, Any], type[Exception], str]] = {
    "format": ("m.pt", "torch", {}, BadInput, "no format 'torch'; there are 'safetensors'"),
    "no path": (None, "onnx", {}, BadInput, "onnx needs a path"),
    "a path": ("m", "semi-structured", {}, BadInput, "in place: give path=None"),
    "suffix of safetensors": ("m.bin", "safetensors", {}, BadInput, "ends in .safetensors"),
    "no folder": ("no/m.safetensors", "safetensors", {}, BadInput, "does not exist"),
    "calibration alone": ("m", "openvino", {"calibration": [X]}, NotDefined, "int8=True"),
    "no example for onnx": ("m.onnx", "onnx", {}, BadInput, "give example_inputs"),
    "no example for openvino": ("m", "openvino", {}, BadInput, "give example_inputs"),
    "no example in place": (None, "semi-structured", {}, BadInput, "give example_inputs"),
    "no tensor in it": ("m.onnx", "onnx", {"example_inputs": {"x": 3}}, BadInput, "hold no tensor; got a dict"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_cannot_be_meant(call: str, tmp_path: Path) -> None:
    path, format, more, error, text = CALLS[call]
    model = net()
    before = state(model)
    with pytest.raises(error, match=text):
        export(model, path and tmp_path / path, format, **more)  # type: ignore[arg-type]
    assert state(model) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_another_format(option: str, tmp_path: Path) -> None:
    value: Any = {"calibration": [X], "include": "0"}.get(option, True)
    with pytest.raises(NotDefined, match=f"{option}= is an option of '{OPTIONS[option]}', not of 'safetensors'"):
        export(net(), tmp_path / "m.safetensors", "safetensors", **{option: value})


def test_a_model_that_its_runtime_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'0.weight' \(6, 4\) is bfloat16.*deepcopy"):
        export(net().bfloat16(), tmp_path / "m.onnx", "onnx", X)
    with pytest.raises(BadInput, match=r"give an nn\.Module, not tensors alone"):
        export(net().state_dict(), tmp_path / "m.onnx", "onnx", X)
    model = net()
    model[0].to("meta")
    with pytest.raises(BadTensor, match="meta"):
        export(model, tmp_path / "m", "openvino", X)


@pytest.mark.parametrize(
    ("package", "format", "extra"),
    [("onnx", "onnx", "onnx"), ("onnxscript", "onnx", "onnx"), ("onnxruntime", "onnx", "onnx"),
     ("openvino", "openvino", "openvino"), ("nncf", "openvino", "openvino")],
)  # fmt: skip
def test_a_package_that_is_missing_is_named(
    package: str, format: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
        if other != package:
            monkeypatch.setitem(sys.modules, other, sys)  # there, whatever is installed
    monkeypatch.setitem(sys.modules, package, None)  # Python's way to say: not installed
    more: dict[str, Any] = {"int8": True} if package == "nncf" else {}
    with pytest.raises(BadInput, match=rf'the package {package}: pip install "secateur\[{extra}\]"'):
        export(net(), tmp_path / f"m.{format}", format, X, **more)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- 2:4


def test_a_pattern_that_is_not_there_is_counted() -> None:
    layer = nn.Linear(64, 32)
    assert str(broken(layer.weight)).startswith("512 of its 512 groups of 4 have more than 2 weights that are not zero")
    secateur.prune(layer, pattern="2:4")
    assert broken(layer.weight) is None
    assert why_not(layer.weight) == "it is on cpu: move the model to the GPU first"
    assert broken(torch.ones(2, 6)) == "its 6 inputs are no whole groups of 4"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half()
    secateur.prune(model, pattern="2:4")
    before = copy.deepcopy(model)
    with pytest.raises(BadInput, match="CUDA GPU, and torch finds none here"):
        export(model, None, "semi-structured", torch.ones(8, 64).half())
    assert state(model) == state(before)
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 4
