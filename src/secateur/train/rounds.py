"""The rounds of an iterative run on disk: each an artefact that is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import BadInput, PlanMismatch
from secateur.stores.staging import clear, staged

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Round:
    """One round of an iterative run.

    Attributes:
        folder: where it lies: ``weights.safetensors``, ``masks.safetensors`` (one bit a weight), ``round.json``.
        number: 0 is the dense network.
        asked: the sparsity asked for, of the chosen weights.
        sparsity: the sparsity found after training.
        metrics: what the user's ``evaluate`` returned.
        how: what was done: rewinding, control, the updates that were asked for (``steps``) and counted (``made``).
        controls: what was trained beside this round, by its name.
    """

    folder: Path
    number: int
    asked: float
    sparsity: float
    metrics: dict[str, float]
    how: dict[str, Any]
    controls: dict[str, Round] = field(default_factory=dict)

    def load(self, model: nn.Module) -> None:
        """Loads the trained weights and buffers into a model of the same shape.

        Raises:
            PlanMismatch: the model has other tensors.
        """
        load_state(model, read_tensors(self.folder / WEIGHTS))

    def masks(self) -> dict[str, Tensor]:
        """The packed keep-masks, one bit a weight, by name; `secateur.Pruner` takes them with `Pruner.hold`."""
        return read_tensors(self.folder / "masks.safetensors")


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Strictly, and with an error of ours."""
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as e:
        raise PlanMismatch(f"the model has changed since this was written: {e}") from None


def read_rounds(folder: str | os.PathLike[str]) -> list[Round]:
    """The finished rounds in a run's folder, in order.

    Raises:
        BadInput: no such folder; a round that is broken, or is missing between others.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"{root} is not the folder of a run.")
    found: list[Round] = []
    for path in sorted(root.glob("round-*"), key=lambda p: int(p.name.removeprefix("round-"))):  # 100 comes after 99
        made = _read(path)
        if made.number != len(found):
            raise BadInput(
                f"{root} has a {path.name}, and no round {len(found)} before it: put that back, or begin anew."
            )
        beside = sorted(root.glob(f"control-{path.name.removeprefix('round-')}-*"))
        made.controls.update({p.name.split("-", 2)[2]: _read(p) for p in beside})
        found.append(made)
    return found


def _read(path: Path) -> Round:
    facts = _json(path / "round.json")
    known = {f.name for f in fields(Round)} - {"folder", "controls"}
    if not isinstance(facts, dict) or {*facts} != known:
        raise BadInput(f"{path / 'round.json'} is not of this version: it should have {', '.join(sorted(known))}.")
    return Round(path, **facts)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} cannot be read: {e}. Put it back, or begin in another folder.") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of an artefact.

    Raises:
        BadInput: the file is gone, or broken.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path} cannot be read: {e}. Put it back, or begin in another folder.") from None


@contextmanager
def artefact(folder: Path, model: nn.Module) -> Iterator[Path]:
    """A folder with a model's weights that is there whole, with what the block puts beside them, or not at all."""
    state = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
    with staged(folder, False, sum(t.numel() * t.element_size() for t in state.values())) as stage:
        stage.mkdir()
        save_file(state, stage / WEIGHTS)
        yield stage


def write_round(root: Path, made: Round, model: nn.Module, masks: Mapping[str, Tensor]) -> Round:
    """Puts a round on disk, whole."""
    facts = {f.name: getattr(made, f.name) for f in fields(made) if f.name not in ("folder", "controls")}
    kind = made.how.get("control")
    folder = root / (f"round-{made.number:02d}" if kind is None else f"control-{made.number:02d}-{kind}")
    with artefact(folder, model) as stage:
        save_file({n: b.contiguous() for n, b in masks.items()}, stage / "masks.safetensors")
        (stage / "round.json").write_text(json.dumps(facts, indent=1), "utf-8")
    return Round(folder, **facts)


def write_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Puts what a run may be rewound to on disk, whole."""
    with staged(path, True, 0) as stage:
        torch.save(state, stage)
        try:
            torch.load(stage, weights_only=True, mmap=True)
        except UnpicklingError:
            raise BadInput(
                "the state of the optimizer, the scheduler or the model holds objects other than tensors and Python's own "
                "numbers, strings, lists and dicts (numpy numbers, as in lr=np.float64(0.1)?): a run could not be taken up."
            ) from None


def read_snapshot(path: Path) -> dict[str, Any]:
    """What `write_snapshot` wrote."""
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as e:
        raise BadInput(f"{path} cannot be read: {str(e).splitlines()[0]}") from None
    return found


@contextmanager
def locked(folder: Path, settings: Mapping[str, Any], free: Collection[str] = ()) -> Iterator[None]:
    """Holds a run's folder; makes it if it is not there, and removes what runs that were killed staged in it.

    The settings named by ``free`` may be others than they were: what lies in the folder does not depend on them.

    Raises:
        BadInput: it cannot be written, another run holds it, or it belongs to a run with other settings.
    """
    from filelock import FileLock, Timeout  # for those who run one

    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BadInput(f"another run is at work in {folder}: wait for it, or choose another folder.") from None
    except OSError as e:
        raise BadInput(f"the run folder {folder} cannot be written: {e}.") from None
    try:
        clear(folder)
        _keep_settings(folder / "run.json", json.loads(json.dumps(dict(settings))), free)
        yield
    finally:
        lock.release()


def check_settings(path: Path, settings: Mapping[str, Any], free: Collection[str] = ()) -> Any:
    """The settings that a file holds.

    Raises:
        BadInput: they differ from these, but for those named by ``free``.
    """
    kept = _json(path)
    before, now = _said(kept), _said(dict(settings))
    if odd := sorted(k for k in {*before, *now} - {*free} if before.get(k) != now.get(k)):
        told = "; ".join(f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in odd)
        raise BadInput(f"{path.parent} holds a run with other settings ({told}): choose another folder.")
    return kept


def _keep_settings(path: Path, settings: dict[str, Any], free: Collection[str]) -> None:
    if path.exists() and check_settings(path, settings, free) == settings:
        return
    text = json.dumps(settings, indent=1)
    with staged(path, True, len(text)) as stage:
        stage.write_text(text, "utf-8")


def _said(settings: Any) -> Any:
    """Settings without those that say nothing: a version may know more of them than the one that began the run."""
    if isinstance(settings, dict):
        return {k: _said(v) for k, v in settings.items() if v is not None}
    return [_said(v) for v in settings] if isinstance(settings, list) else settings
