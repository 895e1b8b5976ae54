"""Plans on disk: a JSON file, and beside it a safetensors file of packed masks where the plan carries them.

The file of masks is named after its contents and the JSON says which it is, so that the two belong together at any
moment: new masks come first, then the JSON in one step, and old masks go last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from secateur.core.plan import Plan
from secateur.errors import BadInput, OutputExists

from . import disk
from .staging import staged


def save_plan(plan: Plan, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a plan as JSON; masks it carries go to ``<path>.<hash>.masks.safetensors`` beside it, one bit a weight.

    Interrupted at any moment, the old plan or the new one can be loaded.

    Args:
        plan: what `secateur.plan` returned.
        path: the JSON file to be.
        overwrite: replace the plan that is there, and its masks.

    Raises:
        OutputExists: something is there already.
        BadInput: the folder does not exist, or has too little room.

    Example:
        >>> import tempfile, torch, secateur
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "plan.json"
        >>> plan = secateur.plan(torch.tensor([3.0, 1.0]), 0.5)
        >>> secateur.save_plan(plan, path)
        >>> secateur.load_plan(path) == plan
        True
    """
    file, text = Path(path), plan.to_json()
    if os.path.lexists(file) and not overwrite:
        raise OutputExists(f"{file} is already there; choose another path, or say overwrite=True.")
    beside = None
    if plan.masks is not None:
        raw = save({name: m.contiguous() for name, m in plan.masks.items()})
        digest = hashlib.sha256(raw).hexdigest()
        beside = _masks_of(file, digest)
        text = json.dumps({**json.loads(text), "masks_sha256": digest}, indent=1)
        with staged(beside, True, len(raw)) as stage:  # what is there under this name has these contents, or is broken
            disk.write_new(stage, raw)
    with staged(file, overwrite, len(text)) as stage:
        disk.write_new(stage, text)
    if overwrite:
        _remove_others(file, beside)


def _remove_others(file: Path, beside: Path | None) -> None:
    """Removes the masks of plans that were at this path before."""
    ours = re.compile(rf"{re.escape(file.name)}\.[0-9a-f]{{16}}\.masks\.safetensors")
    for path in disk.children(file.parent):
        if ours.fullmatch(path.name) and (beside is None or path.name != beside.name):
            disk.remove(path)


def load_plan(path: str | PathLike[str]) -> Plan:
    """Reads a plan that `save_plan` wrote, with its masks if it carries them.

    Args:
        path: the JSON file.

    Returns:
        The same `Plan`.

    Raises:
        BadInput: no such file, not a plan, or its masks are missing or of other sizes.

    Example:
        >>> import tempfile, torch, secateur
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "plan.json"
        >>> secateur.save_plan(secateur.plan(torch.tensor([3.0, 1.0]), 0.5, criterion=lambda weight: -weight), path)
        >>> w = torch.tensor([3.0, 1.0])
        >>> _ = secateur.apply(secateur.load_plan(path), w)
        >>> w
        tensor([0., 1.])
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"there is no plan at {file}.")
    masks = None
    try:
        text = disk.read_text(file)
        beside = _named_masks(file, text)
        if beside is not None and beside[0].exists():
            raw = disk.read_bytes(beside[0])
            if hashlib.sha256(raw).hexdigest() != beside[1]:
                raise BadInput(
                    f"{beside[0].name} does not hold the masks of the plan at {file}: its sha256 is another."
                )
            masks = load(raw)
    except (OSError, SafetensorError, UnicodeDecodeError) as e:
        raise BadInput(f"the plan at {file} cannot be read: {e}") from e
    return Plan.from_json(text, masks)


def _named_masks(file: Path, text: str) -> tuple[Path, str] | None:
    """The masks that a plan's JSON names, and the sha256 they must have; ``None`` if it names none."""
    try:
        digest = json.loads(text)["masks_sha256"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return None  # a plan without masks, or no plan, which is said where it is read
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BadInput(f"the plan at {file} names masks by {digest!r:.80}, which is no sha256.")
    return _masks_of(file, digest), digest


def _masks_of(file: Path, digest: str) -> Path:
    return file.with_name(f"{file.name}.{digest[:16]}.masks.safetensors")
