"""What the exporters gain: bytes on disk in every format, and time in ONNX Runtime and OpenVINO against their own dense runs."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from benchmarks import machine
from benchmarks.result import Result, Table
from benchmarks.timing import Timing, spread, take_turns
from secateur.runtime.export import Exported, export
from secateur.runtime.exporters.openvino_ir import RATE, RATE_KEY, STEM, untold
from secateur.runtime.timing import threads

QUICK, FULL = 1024, 4096
LAYERS = 4
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
TIMED = 0.9
ROWS = (1, 16)
FLUSH = 128 << 20
"""Bytes that are written before each run, so that none finds what the one before it has left in the caches."""
FORMATS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "safetensors": ("safetensors", {}, ()),
    "ONNX": ("onnx", {}, ("onnx", "onnxscript", "onnxruntime")),
    "ONNX, sparse": ("onnx", {"sparse": True}, ("onnx", "onnxscript", "onnxruntime")),
    "OpenVINO": ("openvino", {}, ("openvino",)),
    "OpenVINO, int8": ("openvino", {"int8": True}, ("openvino", "nncf")),
}
"""By what they are called in tables: a format, its options, the packages it needs."""

Run = Callable[[Tensor], object]


def mlp(width: int) -> nn.Module:
    """Four square layers with ReLU between them."""
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def installed() -> dict[str, tuple[str, dict[str, Any], tuple[str, ...]]]:
    """The formats whose packages are here."""
    return {n: f for n, f in FORMATS.items() if all(importlib.util.find_spec(p) for p in f[2])}


def exported(model: nn.Module, folder: Path, called: str, x: Tensor) -> Exported:
    """The model in one of `FORMATS`."""
    format, options, _ = FORMATS[called]
    suffix = "" if format == "openvino" else f".{format}"
    path = folder / f"{called.replace(', ', '-')}{suffix}"
    return export(model, path, format, x, overwrite=True, **options)  # type: ignore[arg-type]


def sizes(width: int, folder: Path) -> Table:
    """Bytes of the model in every format, dense and pruned."""
    x = torch.randn(16, width)
    found: dict[str, list[int]] = {called: [] for called in installed()}
    for sparsity in (None, *SPARSITIES):
        model = mlp(width)
        if sparsity is not None:
            secateur.prune(model, sparsity)
        for called, made in found.items():
            made.append(exported(model, folder, called, x).bytes)
    heads = ("<", "dense, MB", *(f"{s:.0%} zero, MB" for s in SPARSITIES), "at 90%, times smaller")
    at = 1 + SPARSITIES.index(0.9)
    rows = [(n, *(f"{b / 1e6:.1f}" for b in made), f"{made[0] / made[at]:.2f}") for n, made in found.items()]
    return Table(f"Files of a network of {LAYERS} layers {width}×{width} in float32", heads, rows)


def onnx_session(path: str) -> Run:
    """A file in ONNX Runtime, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def openvino_model(path: str, rate: float) -> Run:
    """A folder in OpenVINO, on one thread; layers with at least ``rate`` zeros may run as sparse ones, from 1 on none."""
    with untold():
        import openvino

    settings = {RATE_KEY: rate, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(f"{path}/{STEM}.xml", "CPU", settings)
    return lambda x: compiled([x.numpy()])


def candidates(width: int, folder: Path) -> tuple[dict[str, tuple[str, Run]], list[str]]:
    """What is timed: a name, the name of the dense run it is held against, and how it is run; and notes of the exporters."""
    x = torch.randn(16, width)
    dense, pruned = mlp(width), mlp(width)
    secateur.prune(pruned, TIMED)
    here, notes = installed(), list[str]()
    found: dict[str, tuple[str, Run]] = {"torch, dense": ("torch, dense", dense)}
    for part, model in (("dense", dense), (f"{TIMED:.0%} zero", pruned)):
        place = folder / part.replace("% ", "-")
        place.mkdir()
        for called in ("ONNX", "OpenVINO", "OpenVINO, int8"):
            if called not in here:
                continue
            name = "ONNX, sparse" if called == "ONNX" and model is pruned else called
            made = exported(model, place, name, x)
            assert made.path is not None
            if called == "ONNX":
                found[f"{called}, {part}"] = (f"{called}, dense", onnx_session(made.path))
                continue
            found[f"{called}, {part}"] = (f"{called}, dense", openvino_model(made.path, 1.0))
            if called == "OpenVINO, int8" and model is pruned:
                notes += made.notes
                found[f"{called}, {part}, sparse rate {RATE}"] = (f"{called}, dense", openvino_model(made.path, RATE))
    return found, notes


def times(width: int, folder: Path, repeats: int) -> tuple[list[Table], list[str]]:
    """Every candidate, in turns, at each number of rows."""
    found, notes = candidates(width, folder)
    other = torch.ones(FLUSH // 4)
    gc.freeze()  # the exporters leave millions of objects, which would be looked through before every run
    tables = []
    for rows in ROWS:
        x = torch.randn(rows, width)
        with torch.no_grad(), threads(1):
            taken = take_turns({n: _on(run, x) for n, (_, run) in found.items()}, partial(other.add_, 1), repeats)
        lines = [_line(n, taken, base) for n, (base, _) in found.items()]
        heads = ("<", "ms", "times faster than the same runtime, dense", "times faster than torch, dense float32")
        count = f"{rows} row{'s' if rows > 1 else ''}"
        tables.append(
            Table(
                f"{count}, {LAYERS} layers {width}×{width}, one thread, {repeats} turns: median (min–max)", heads, lines
            )
        )
    gc.unfreeze()
    return tables, notes


def _on(run: Run, x: Tensor) -> Callable[[], object]:
    return lambda: run(x)


def _line(name: str, taken: dict[str, Timing], base: str) -> tuple[str, ...]:
    mine = taken[name]
    own, torchs = (spread(taken[other].per(mine)) for other in (base, "torch, dense"))
    return (name, mine.milliseconds(), "1" if base == name else own, "1" if name == "torch, dense" else torchs)


def run(full: bool, repeats: int = 21) -> Result:
    """Measures everything that docs/export.md tells of."""
    before, width = machine.load(), FULL if full else QUICK
    with tempfile.TemporaryDirectory() as folder:
        tables = [sizes(QUICK, Path(folder))]
        timed, notes = times(width, Path(folder), repeats)
    tables += timed
    if notes:
        tables.append(Table("What the exporter says of OpenVINO, int8", ("<",), [(n,) for n in notes]))
    command = f"python -m benchmarks export{' --full' if full else ''}"
    return Result("export", command, machine.machine(before), tables)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["export"])
