"""Pruning a Hugging Face folder with data: the model is loaded and pruned, and its weights go into a copy of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibrated import prune_calibrated
from secateur.carry import Globs, count_rows
from secateur.core.request import Request
from secateur.core.solve.asked import AnySolver
from secateur.core.types import Spec
from secateur.errors import BadInput, PlanMismatch
from secateur.evaluate.calibrate import Calibration
from secateur.report.report import Report, ReportRow
from secateur.stores.architectures import class_of
from secateur.stores.base import choose
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.memory import MemoryStore

RUN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a model can be run in."""


def load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, of the class its config names.

    Raises:
        BadInput: not such a folder, a class that transformers does not have, weights that are not there, or transformers is
            missing.
    """
    made = class_of(folder)
    try:
        model, found = made.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as e:  # of a library's own choice
        raise BadInput(f"transformers cannot load {folder}: {str(e).splitlines()[0] if str(e) else e!r}") from e
    if missing := sorted(found["missing_keys"]):
        some = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise BadInput(
            f"{folder} does not hold all weights of a {made.__name__}, which would be drawn at random: {some}. Does its config "
            "name another architecture than it holds?"
        )
    return model.eval()


def prune_folder(
    path: Path,
    request: Request,
    calibration: Calibration,
    solver: AnySolver | None,
    include: Globs,
    ignore: Globs,
    roles: Mapping[str, str] | None,
    out: Any,
    overwrite: bool,
) -> Report:
    """Prunes the model of a folder with data, and writes a copy of the folder that holds the new weights.

    Raises:
        BadInput: a folder that transformers cannot load as it is, or a place where no result can be put.
        PlanMismatch: the folder names or cuts its tensors otherwise than the model does.
    """
    store = CheckpointStore(path, roles=roles)
    store.refuse_out(out, overwrite)
    model = load_model(path, _dtype_of(store))
    chosen = [s for s in choose(MemoryStore(model, roles=roles).specs(), include, ignore) if s.skip is None]
    _matched(store, chosen, path)
    report = prune_calibrated(
        model, request, calibration, solver, include, ignore, roles, undo=False, stacklevel=4
    )  # nobody has the model but this call
    shown, memory = {r.name for r in report.shown}, MemoryStore(model, roles=roles)
    written = {s.name: s for s in memory.specs() if s.name in shown}
    files = _matched(store, list(written.values()), path)
    with torch.no_grad(), store.staged(out, overwrite):
        for name, spec in written.items():
            _write(store, files[name], memory.entry(spec).tensor)
        rows = _rows(store, report, files)
    return Report(rows, report.asked, report.warnings, str(out))


def _dtype_of(store: CheckpointStore) -> torch.dtype:
    """The one dtype of a folder's layers: weights that were rounded to another could not be written back as they were."""
    kinds = {s.dtype for s in store.specs() if s.skip is None and s.dtype.is_floating_point}
    if len(kinds) != 1 or not kinds <= set(RUN):
        names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds)) or "none"
        raise BadInput(
            f"{store.path} stores the weights of its layers in {names}; a model is run in one of float64, float32, float16 and "
            "bfloat16. Load it, prune the model, and save that with save_pretrained."
        )
    return kinds.pop()


def _rows(store: CheckpointStore, report: Report, files: Mapping[str, Spec]) -> tuple[ReportRow, ...]:
    """What was counted in the files, with what the model's report says of it."""
    told = {files[r.name].name: r for r in report.rows if r.name in files}
    specs = [replace(s, skip=told[s.name].skip if s.name in told else s.skip or "not chosen") for s in store.specs()]
    return tuple(
        replace(r, asked=told[r.name].asked, goes_with=told[r.name].goes_with) if r.name in told else r
        for r in count_rows(specs, store)
    )


def _matched(store: CheckpointStore, specs: list[Spec], path: Path) -> dict[str, Spec]:
    """The file's tensor for each of the model's."""
    stored = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
    found: dict[str, Spec] = {}
    for s in specs:
        match = next((stored[n] for n in (s.name, *s.aliases) if n in stored), None)
        if match is None or (match.shape, match.dtype) != (s.shape, s.dtype):
            raise PlanMismatch(
                f"the model has {s}, but {path} stores {'no tensor of that name' if match is None else match}: it names or cuts "
                "its tensors otherwise than the model does. Load it, prune the model, and save that with save_pretrained."
            )
        found[s.name] = match
    return found


def _write(store: CheckpointStore, spec: Spec, value: Tensor) -> None:
    for part in store.parts(spec, "whole"):
        part.tensor.copy_(value)
        store.write(part)
