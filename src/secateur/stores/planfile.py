"""Plans on disk: a JSON file, and beside it a safetensors file of packed masks where the plan carries them."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.core.plan import Plan
from secateur.errors import BadInput, OutputExists

from .staging import readable_by_all, staged


def save_plan(plan: Plan, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a plan as JSON; a plan that carries masks also as ``<path>.masks.safetensors``, one bit a weight.

    Args:
        plan: what `secateur.plan` returned.
        path: the JSON file to be.
        overwrite: replace what is there.

    Raises:
        OutputExists: one of the files is there already.
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
    for taken in [Path(path), *([_masks_of(path)] if plan.masks is not None else [])]:
        if os.path.lexists(taken) and not overwrite:
            raise OutputExists(f"{taken} is already there; choose another path, or say overwrite=True.")
    if plan.masks is not None:
        bits = {name: m.contiguous() for name, m in plan.masks.items()}
        with staged(_masks_of(path), overwrite, sum(b.numel() for b in bits.values())) as stage:
            save_file(bits, stage)
            readable_by_all(stage)
    text = plan.to_json()
    with staged(Path(path), overwrite, len(text)) as stage:
        stage.write_text(text, "utf-8")


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
    beside = _masks_of(path)
    try:
        if beside.exists():
            with safe_open(beside, framework="pt") as f:
                masks = {name: f.get_tensor(name) for name in f.keys()}
        text = file.read_text("utf-8")
    except (OSError, SafetensorError, UnicodeDecodeError) as e:
        raise BadInput(f"the plan at {file} cannot be read: {e}") from e
    plan = Plan.from_json(text, masks)
    if plan.masks is None:
        return plan
    for row in plan.chosen:
        if row.name not in plan.masks or plan.masks[row.name].shape != ((row.numel + 7) // 8,):
            raise BadInput(f"{beside.name} does not hold the mask of {row.spec}.")
    return plan


def _masks_of(path: str | PathLike[str]) -> Path:
    return Path(f"{Path(path)}.masks.safetensors")
