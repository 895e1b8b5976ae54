"""ONNX: parameters keep their names, zeros may be left out of the file, and ONNX Runtime runs it as a dense model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.keys import nonzero
from secateur.errors import BadInput, SecateurError
from secateur.stores.memory import MemoryStore
from secateur.stores.staging import refuse_place, staged

from .running import (
    Call,
    Run,
    Shape,
    at_rest,
    first_line,
    outputs,
    quiet,
    tolerance_of,
    traced,
    variants,
    verify,
    words,
)
from .target import Written, need, parameters, runnable, same_bits

SUFFIX = ".onnx"
MOST_BYTES = 2**31 - 1
"""What a protobuf can hold."""
_SILENT = 3
DENSE = "ONNX Runtime has no products with sparse weights: zeros gain neither time nor memory."
SPARSE = (
    "Zeros are left out of the file only: ONNX Runtime puts them back when it loads it. Indices are int32, which ONNX Runtime "
    "reads; onnx.checker asks for int64, which would make the file larger."
)


def write(model: Any, store: MemoryStore, path: Path, example: Any, sparse: bool, overwrite: bool) -> Written:
    """Writes a model as ONNX, and runs the file on the example inputs.

    Args:
        model: left as it is.
        store: its tensors.
        path: ends in ``.onnx``.
        example: what the model is called with.
        sparse: whether weights are stored without their zeros where that is smaller.
        overwrite: whether something may be at ``path``.

    Raises:
        BadInput: onnx, onnxscript or onnxruntime is missing, or the model or the example cannot be used.
        SecateurError: the file gives other outputs than the model; nothing is written.
    """
    call, model = Call.of(example, "onnx").each(Tensor.cpu), runnable(model, "onnx")
    onnx = need("onnx", "onnx", "the format onnx")
    need("onnxscript", "onnx", "the format onnx")
    runtime = need("onnxruntime", "onnx", "verifying ONNX by running it")
    if path.suffix != SUFFIX:
        raise BadInput(f"an ONNX file's name ends in {SUFFIX}; got {str(path)!r}.")
    size = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    if size > MOST_BYTES:
        raise BadInput(f"one ONNX file holds at most {MOST_BYTES} bytes, and the model's tensors are {size}.")
    refuse_place(path, overwrite)
    with at_rest(model):
        proto, shapes = _proto(model, call)
        dense = proto.ByteSize()
        left_out = _sparsify(proto, onnx) if sparse else []
        with staged(path, overwrite, proto.ByteSize()) as stage:
            stage.write_bytes(proto.SerializeToString())
            absent, zeros, total = _counted(onnx, stage, model, store)
            run = _runner(runtime, stage)
            worst = verify(partial(outputs, model), run, list(variants(call, shapes)), tolerance_of(model))
            written = stage.stat().st_size
    facts = {
        "inputs": {i.name: words(s) for i, s in zip(proto.graph.input, shapes, strict=True)},
        "difference": worst,
        "dense_bytes": dense,
        "sparse": left_out,
        "absent": absent,
    }
    return Written(written, zeros, total, facts, (DENSE, SPARSE) if left_out else (DENSE,))


def _proto(model: nn.Module, call: Call) -> tuple[Any, list[Shape]]:
    program, shapes = traced(model, call)
    try:
        with quiet():  # not optimised: constants that are folded lose their names, and every runtime folds them anyway
            made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            assert made is not None
            proto = made.model_proto
    except Exception as e:
        raise BadInput(f"torch.onnx cannot express the model: {first_line(e)}") from e
    _without_traces(proto.graph)
    for function in proto.functions:
        _without_traces(function)
    return proto, shapes


def _without_traces(graph: Any) -> None:
    """Takes out what torch notes beside every node: stack traces, with the paths of this machine."""
    for entry in (
        graph,
        *graph.node,
        *graph.value_info,
        *getattr(graph, "input", ()),
        *getattr(graph, "initializer", ()),
    ):
        for field in ("metadata_props", "doc_string"):
            if hasattr(entry, field):
                entry.ClearField(field)


def _sparsify(proto: Any, onnx: Any) -> list[str]:
    """Moves initializers that are smaller without their zeros to ``sparse_initializer``; their names."""
    moved = []
    for tensor in list(proto.graph.initializer):
        values = onnx.numpy_helper.to_array(tensor).reshape(-1)
        if not 1 < values.size < 2**31 or len(tensor.dims) < 2:
            continue
        where = np.flatnonzero(values.view(f"u{values.itemsize}"))  # by bits: -0.0 stays
        if where.size * (values.itemsize + 4) >= values.nbytes:
            continue
        sparse = proto.graph.sparse_initializer.add(dims=tensor.dims)
        sparse.values.CopyFrom(onnx.numpy_helper.from_array(values[where], tensor.name))
        sparse.indices.CopyFrom(onnx.numpy_helper.from_array(where.astype(np.int32), f"{tensor.name}_indices"))
        moved.append(tensor.name)
        proto.graph.initializer.remove(tensor)
    return moved


def _counted(onnx: Any, path: Path, model: nn.Module, store: MemoryStore) -> tuple[list[str], int, int]:
    """What a file holds of the model.

    Returns:
        Parameters that are not in it, because the forward pass does not use them; zeros and elements of the weights that are.

    Raises:
        SecateurError: a parameter's bits are not those of the model.
    """
    graph, wanted = onnx.load(path).graph, parameters(model)
    whole = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name in wanted}
    held = {n: torch.from_numpy(a.copy()) for n, a in whole.items()}
    held |= {s.values.name: _expanded(onnx, s) for s in graph.sparse_initializer if s.values.name in wanted}
    for name, t in held.items():
        if not same_bits(t, wanted[name]):
            raise SecateurError(f"{name!r} in the file has other values than the model's: a bug.")
    absent, zeros, total = list[str](), 0, 0
    for spec in store.every():
        found = [held[n] for n in (spec.name, *spec.aliases) if n in held]
        if not found:
            absent.append(spec.name)
        elif spec.skip is None:
            zeros += int((~nonzero(found[0])).sum())
            total += found[0].numel()
    return absent, zeros, total


def _expanded(onnx: Any, sparse: Any) -> Tensor:
    values: NDArray[Any] = onnx.numpy_helper.to_array(sparse.values)
    out = np.zeros(int(np.prod(sparse.dims)), values.dtype)
    out[onnx.numpy_helper.to_array(sparse.indices)] = values
    return torch.from_numpy(out.reshape(tuple(sparse.dims)))


def _runner(runtime: Any, path: Path) -> Run:
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise SecateurError(f"ONNX Runtime does not load the exported model: {first_line(e)}") from e
    names = [i.name for i in session.get_inputs()]

    def run(call: Call) -> list[Tensor]:
        found = session.run(None, dict(zip(names, call.arrays(), strict=True)))
        return [torch.from_numpy(a) for a in found]

    return run
