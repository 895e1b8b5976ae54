"""OpenVINO: weights in the layout its sparse product needs, zeros kept in int8, and the truth about what ran."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import BadInput, OutputExists, SecateurError
from secateur.runtime.export import export
from secateur.runtime.exporters.openvino_ir import untold
from tests.integration.exporting import (
    EXAMPLES,
    MANY,
    NETS,
    OTHERS,
    Branches,
    Counts,
    Draws,
    Plain,
    call,
    close,
    everything,
    mlp,
)

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)
with untold():
    import openvino

LAYERS = {
    **{f"encoder.layer.0.attention.self.{n}": (64, 64) for n in ("query", "key", "value")},
    "encoder.layer.0.attention.output.dense": (64, 64),
    "encoder.layer.0.intermediate.dense": (128, 64),
    "encoder.layer.0.output.dense": (64, 128),
    "pooler.dense": (64, 64),
}
"""Of `bert`."""


def ran(folder: Path, inputs: Any) -> list[Any]:
    """What OpenVINO gives, compiled anew."""
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    if isinstance(inputs, dict):
        inputs = {n: t.numpy() for n, t in inputs.items()}
    else:
        inputs = [(inputs[0] if isinstance(inputs, tuple) else inputs).numpy()]
    return [np.array(a) for a in compiled(inputs).values()]


def products(folder: Path) -> dict[str, Any]:
    """Products with constants, by name, in the file."""
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    return {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"}


def test_outputs_names_and_layout_of_a_model_that_is_left_alone(tmp_path: Path) -> None:
    model, folder = NETS["bert"]().train(), tmp_path / "ir"
    before = everything(model)
    made = export(model, folder, "openvino", EXAMPLES["bert"])
    assert everything(model) == before
    assert close(ran(folder, OTHERS["bert"]), call(model, OTHERS["bert"]), 1e-5)
    assert made.facts["difference"] < 1e-5
    assert {p.name for p in folder.iterdir()} == {"openvino_model.xml", "openvino_model.bin"}
    assert made.bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert {x["name"]: x["shape"] for x in made.facts["layers"]} == LAYERS
    for layer in made.facts["layers"]:
        assert products(folder)[layer["name"]].get_attributes()["transpose_b"] is True
        weight = model.get_parameter(f"{layer['name']}.weight")
        assert layer["zeros"] == int((weight == 0).sum()) > 0
        assert layer["dtype"] == "f32" and layer["sparse"] is False
    assert any("zeros gain no time" in note for note in made.notes)


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_int8_keeps_zeros_and_says_what_ran(net: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("nncf is not installed")
    model = NETS[net]()
    before = everything(model)
    many = (batch[net] for batch in MANY)
    made = export(model, tmp_path / "ir", "openvino", EXAMPLES[net], int8=True, calibration=many)
    assert everything(model) == before
    assert close(ran(tmp_path / "ir", OTHERS[net]), call(model, OTHERS[net]), 0.05)
    assert 0 < made.facts["difference"] < 0.05
    layers = made.facts["layers"]
    assert {layer["dtype"] for layer in layers} == {"i8"}
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert made.total == sum(p.numel() for p in weights)
    assert made.zeros >= sum(int((p == 0).sum()) for p in weights)
    assert made.bytes < sum(p.numel() for p in model.parameters()) + 60_000
    for layer in layers:
        fits = len(layer["shape"]) == 2 and not any(n % 64 for n in layer["shape"])
        assert layer["primitive"] != "unknown"
        assert layer["sparse"] is (fits and made.facts["amx"]), layer
    text = " ".join(made.notes)
    assert "others may be clipped" not in text
    if not any(layer["sparse"] for layer in layers):
        assert "sparse int8 product was NOT used here" in text
        assert made.facts["amx"] or "this CPU has no AMX" in text
    else:
        assert "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE" in text


def test_ranges_of_the_examples_alone_are_told_of(tmp_path: Path) -> None:
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("nncf is not installed")
    made = export(mlp(), tmp_path / "ir", "openvino", EXAMPLES["mlp"], int8=True)
    assert any("from which its ranges were taken (others may be clipped" in note for note in made.notes)
    with pytest.raises(BadInput, match="calibration is empty"):
        export(mlp(), tmp_path / "other", "openvino", EXAMPLES["mlp"], int8=True, calibration=[])
    assert [p.name for p in tmp_path.iterdir()] == ["ir"]


def test_weights_that_lie_the_other_way_are_turned(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(128, 64)
    made = export(nn.Sequential(layer), tmp_path / "ir", "openvino", torch.randn(4, 64))
    assert [(x["name"], x["shape"]) for x in made.facts["layers"]] == [("0", (128, 64))]
    assert products(tmp_path / "ir")["0"].get_attributes()["transpose_b"] is True


def test_what_is_there_stays_unless_asked(tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    export(mlp(0.5), folder, "openvino", EXAMPLES["mlp"])
    before = (folder / "openvino_model.bin").read_bytes()
    with pytest.raises(OutputExists):
        export(mlp(0.9), folder, "openvino", EXAMPLES["mlp"])
    assert (folder / "openvino_model.bin").read_bytes() == before
    export(mlp(0.9), folder, "openvino", EXAMPLES["mlp"], overwrite=True)
    assert (folder / "openvino_model.bin").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["ir"]


def test_what_tells_its_makers_was_not_imported() -> None:
    assert "openvino" in sys.modules
    assert "openvino_telemetry" not in sys.modules


BAD: dict[str, tuple[nn.Module, str, type[Exception], str]] = {
    "never the same": (Counts(), "ir", SecateurError, "differ from the model's by"),
    "branching": (Branches(), "ir", BadInput, "cannot make a graph of the model"),
    "random": (Draws(), "ir", BadInput, "No conversion rule found for operations: aten.rand_like"),
    "a file": (Plain(), "ir.xml", BadInput, "name the folder they go to"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_verified_is_not_written(bad: str, tmp_path: Path) -> None:
    model, path, error, text = BAD[bad]
    before = everything(model)
    with pytest.raises(error, match=text) as e:
        export(model, tmp_path / path, "openvino", torch.randn(2, 8))
    assert type(e.value) is error
    assert not list(tmp_path.iterdir())
    assert everything(model) == before
