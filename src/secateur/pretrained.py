"""Pruning a Hugging Face folder with data: the model is loaded and pruned, and its weights go into a copy of the folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibrated import prune_calibrated
from secateur.carry import Globs, count_rows
from secateur.core.make import Request
from secateur.core.solve.asked import AnySolver
from secateur.core.types import Spec
from secateur.errors import BadInput, PlanMismatch
from secateur.evaluate.calibrate import Calibration
from secateur.report.report import Report
from secateur.stores.base import choose
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.memory import MemoryStore

EXTRA = 'it needs the package transformers: pip install "secateur[hf]".'


def load_model(folder: Path) -> nn.Module:
    """The model of a folder, of the class its config names, in the dtype it is stored in.

    Raises:
        BadInput: not such a folder, a class that transformers does not have, or transformers is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise BadInput(
            f"{folder} has no config.json, so the model cannot be run on the calibration. Give a Hugging Face folder, or load "
            "the model yourself and pass the nn.Module."
        )
    try:
        names = json.loads(config.read_text("utf-8")).get("architectures") or []
        library = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise BadInput(f"calibration runs the model of {folder}; {EXTRA}") from None
    except (ValueError, AttributeError) as e:
        raise BadInput(f"{config} is not a config of transformers: {e}.") from e
    made = getattr(library, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(made, type) and issubclass(made, library.PreTrainedModel)):
        raise BadInput(
            f"{config} names the architecture {names!r}, which transformers {library.__version__} does not have."
        )
    model: nn.Module = made.from_pretrained(str(folder), dtype="auto", local_files_only=True)  # type: ignore[attr-defined]
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
        PlanMismatch: the folder names or cuts its tensors otherwise than the model does.
    """
    store = CheckpointStore(path, roles=roles)
    model = load_model(path)
    _matched(
        store, [s for s in choose(MemoryStore(model, roles=roles).specs(), include, ignore) if s.skip is None], path
    )
    report = prune_calibrated(model, request, calibration, solver, include, ignore, roles)
    memory = MemoryStore(model, roles=roles)
    written = {s.name: s for s in memory.specs() if s.name in {r.name for r in report.shown}}
    files = _matched(store, list(written.values()), path)
    with torch.no_grad(), store.staged(out, overwrite):
        for name, spec in written.items():
            _write(store, files[name], memory.entry(spec).tensor)
        asked = {r.name: r for r in report.rows}
        back = {s.name: name for name, s in files.items()}
        skips = {s.name: asked[back[s.name]] for s in store.specs() if s.name in back}
        specs = [
            replace(s, skip=skips[s.name].skip if s.name in skips else s.skip or "not chosen") for s in store.specs()
        ]
        rows = [
            replace(r, asked=skips[r.name].asked, goes_with=skips[r.name].goes_with) if r.name in skips else r
            for r in count_rows(specs, store)
        ]
    return Report(tuple(rows), report.asked, report.warnings, str(out))


def _matched(store: CheckpointStore, specs: list[Spec], path: Path) -> dict[str, Spec]:
    """The file's tensor for each of the model's."""
    stored = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
    found: dict[str, Spec] = {}
    for s in specs:
        match = next((stored[n] for n in (s.name, *s.aliases) if n in stored), None)
        if match is None or match.shape != s.shape:
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
