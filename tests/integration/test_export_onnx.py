"""ONNX: names, zeros, outputs, open batches, a smaller file without the zeros, and a model that is left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.errors import BadInput, OutputExists, SecateurError
from secateur.runtime.export import export
from tests.integration.exporting import (
    EXAMPLES,
    NETS,
    OTHERS,
    Branches,
    Counts,
    Divides,
    Plain,
    Tied,
    call,
    close,
    everything,
    mlp,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


def ran(path: Path, inputs: Any) -> list[Any]:
    """What ONNX Runtime gives, in a session of its own."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if not isinstance(inputs, dict):
        (name,) = (i.name for i in session.get_inputs())
        inputs = {name: inputs[0] if isinstance(inputs, tuple) else inputs}
    found: list[Any] = session.run(None, {n: t.numpy() for n, t in inputs.items()})
    return found


def held(path: Path) -> dict[str, Any]:
    """Initializers by name, sparse ones put together here."""
    graph = onnx.load(path).graph
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for s in graph.sparse_initializer:
        flat = np.zeros(np.prod(s.dims), onnx.numpy_helper.to_array(s.values).dtype)
        flat[onnx.numpy_helper.to_array(s.indices)] = onnx.numpy_helper.to_array(s.values)
        found[s.values.name] = flat.reshape(s.dims)
    return found


@pytest.mark.parametrize("net", ["cnn", "bert"])
def test_names_zeros_and_outputs_in_a_file_of_a_model_that_is_left_alone(net: str, tmp_path: Path) -> None:
    model = NETS[net]().train()
    if net == "cnn":
        model(torch.randn(4, 3, 12, 12)).sum().backward()
        model[1].eval()  # type: ignore[index]
        model[4].weight.requires_grad_(False)  # type: ignore[index]
        model[0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    before, seed, path = everything(model), torch.random.get_rng_state(), tmp_path / "m.onnx"
    made = export(model, path, "onnx", EXAMPLES[net], sparse=net == "bert")
    assert everything(model) == before
    assert torch.equal(torch.random.get_rng_state(), seed)
    tensors = held(path)
    assert all(tensors[n].tobytes() == p.detach().numpy().tobytes() for n, p in model.named_parameters())
    report = secateur.prune(copy.deepcopy(model), made.sparsity)
    assert (made.zeros, made.total) == (report.zeros, report.total)
    assert made.facts["absent"] == []
    assert close(ran(path, OTHERS[net]), call(model, OTHERS[net]), 1e-5)
    assert made.facts["difference"] < 1e-5
    assert made.bytes == path.stat().st_size
    content = path.read_bytes()  # torch would note where in its sources and ours each node comes from
    assert b".py" not in content and str(Path(torch.__file__).parent).encode() not in content


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_its_zeros_the_file_is_smaller_and_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model = mlp(0.9).to(dtype)
    with torch.no_grad():
        model[0].weight[0, :2] = torch.tensor([-0.0, 1.0])  # type: ignore[index]
    path, x = tmp_path / "m.onnx", EXAMPLES["mlp"].to(dtype)
    made = export(model, path, "onnx", x, sparse=True)
    size = dtype.itemsize
    assert made.bytes == path.stat().st_size < made.facts["dense_bytes"] * 1.1 * 0.1 * (size + 4) / size
    assert made.facts["sparse"] == ["0.weight", "2.weight", "4.weight"]
    assert made.facts["dense_bytes"] > sum(p.nbytes for p in model.parameters())
    tensors = held(path)
    assert all(tensors[n].tobytes() == p.detach().numpy().tobytes() for n, p in model.named_parameters())
    assert {s.indices.data_type for s in onnx.load(path).graph.sparse_initializer} == {onnx.TensorProto.INT32}
    assert close(ran(path, x), call(model, x), 1e-3)
    assert any("out of the file only" in note for note in made.notes)


def test_a_compiled_model_and_a_batch_of_one(tmp_path: Path) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    made = export(compiled, tmp_path / "m.onnx", "onnx", EXAMPLES["mlp"][:1])
    assert set(dict(model.named_parameters())) <= set(held(tmp_path / "m.onnx"))
    assert made.facts["inputs"] == {"input": "any × 128"}
    assert close(ran(tmp_path / "m.onnx", OTHERS["mlp"]), call(model, OTHERS["mlp"]), 1e-5)


def test_ties_and_what_is_not_used(tmp_path: Path) -> None:
    model = Tied()
    secateur.prune(model, 0.5, include="words.weight")
    made = export(model, tmp_path / "m.onnx", "onnx", torch.randint(0, 50, (2, 5)))
    tensors = held(tmp_path / "m.onnx")
    assert made.facts["absent"] == ["unused.bias", "unused.weight"]
    assert len({"words.weight", "head.weight"} & set(tensors)) == 1
    assert tensors["shift"].tobytes() == model.shift.numpy().tobytes()


def test_what_is_there_stays_unless_asked_and_few_zeros_stay_in_the_file(tmp_path: Path) -> None:
    model, path = mlp(0.3), tmp_path / "m.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(OutputExists):
        export(model, path, "onnx", EXAMPLES["mlp"])
    assert path.read_bytes() == b"mine"
    made = export(model, path, "onnx", EXAMPLES["mlp"], sparse=True, overwrite=True)
    assert set(held(path)) == {n for n, _ in model.named_parameters()}
    assert made.facts["sparse"] == [] and made.bytes == made.facts["dense_bytes"]
    assert len(made.notes) == 1 and "neither time nor memory" in made.notes[0]
    assert list(tmp_path.iterdir()) == [path]


BAD: dict[str, tuple[nn.Module, Any, type[Exception], str]] = {
    "never the same": (Counts(), torch.randn(2, 8), SecateurError, "differ from the model's by"),
    "infinite": (Divides(), torch.randn(2, 8), BadInput, "NaN or Inf"),
    "branching": (Branches(), torch.randn(2, 8), BadInput, "cannot make a graph of the model"),
    "of another shape": (Plain(), torch.randn(2, 9), BadInput, "does not run on the example inputs"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_verified_is_not_written(bad: str, tmp_path: Path) -> None:
    model, x, error, text = BAD[bad]
    before = everything(model)
    with pytest.raises(error, match=text) as e:
        export(model, tmp_path / "m.onnx", "onnx", x)
    assert type(e.value) is error
    assert not list(tmp_path.iterdir())
    assert everything(model) == before
