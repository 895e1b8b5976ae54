"""A result against its manifest: is everything there, and as it was written?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import BadInput

from . import disk
from .checkpoint import CheckpointStore
from .rewrite import Look
from .safetensors_file import SUFFIX
from .stage import MANIFEST

MOST = 1 << 30


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        path: of the result.
        files: how many files were compared.
        pruned, of: zeros in the pruned tensors, and weights in them.
        wrong: a sentence for everything that is not as the manifest says; empty if all is well.
    """

    path: str
    files: int
    pruned: int
    of: int
    wrong: tuple[str, ...]


def verify(path: str | os.PathLike[str]) -> Verified:
    """Compares a result with its manifest: every file by its bytes, every tensor by its zeros.

    Args:
        path: a folder that ``secateur prune`` or ``secateur apply`` wrote.

    Returns:
        What was found; its ``wrong`` is empty where all is as it was written.

    Raises:
        BadInput: there is no manifest, or it is not one.

    Example:
        >>> import tempfile, secateur, torch
        >>> from safetensors.torch import save_file
        >>> here = Path(tempfile.mkdtemp())
        >>> (here / "in").mkdir()
        >>> save_file({"fc.weight": torch.randn(8, 8)}, here / "in" / "model.safetensors")
        >>> _ = secateur.prune(here / "in", 0.5, out=here / "out")
        >>> secateur.verify(here / "out").wrong
        ()
    """
    path = Path(path)
    told = _manifest(path)
    wrong: list[str] = []
    listed: dict[str, str] = {f: d["sha256"] for f, d in told["files"].items()} | dict(told["carried"])
    for file, sha256 in sorted(listed.items()):
        found = path / file
        if not _is_file(found):
            wrong.append(f"{file} is not there")
        elif (seen := disk.sha256(found)) != sha256:
            wrong.append(f"{file} has the sha256 {seen[:16]}…, and the manifest says {sha256[:16]}…")
    others = {p.name for p in path.glob(f"*{SUFFIX}")} - set(listed)
    wrong += [f"{file} is not in the manifest" for file in sorted(others)]
    if not wrong:
        wrong += _other_zeros(CheckpointStore(path), told["zeros"])
    pruned = told["pruned"].values()
    return Verified(str(path), len(listed), sum(p["zeros"] for p in pruned), sum(p["of"] for p in pruned), tuple(wrong))


def _manifest(path: Path) -> Mapping[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise BadInput(
            f"{path} has no {MANIFEST}: it is no folder that secateur wrote whole. (A single file has none: it was read back "
            "while it was written.)"
        )
    try:
        if file.stat().st_size > MOST:
            raise ValueError("it is too large")
        told = json.loads(disk.read_text(file))
        sizes = [f["bytes"] for f in told["files"].values()] + list(told["zeros"].values())
        sizes += [n for p in told["pruned"].values() for n in (p["zeros"], p["of"])]
        hashes = [f["sha256"] for f in told["files"].values()] + list(told["carried"].values())
        names = [*told["files"], *told["carried"]]
        whole = told["secateur_manifest"] == 1 and all(type(n) is int and n >= 0 for n in sizes)
        if not whole or not all(isinstance(h, str) and len(h) == 64 for h in hashes):
            raise ValueError("its numbers or hashes are none")
        if any(Path(n).is_absolute() or ".." in Path(n).parts for n in names):
            raise ValueError("names in it are no paths out of the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise BadInput(f"{file} is not a manifest of secateur: {e}") from e
    return told


def _other_zeros(store: CheckpointStore, zeros: Mapping[str, int]) -> list[str]:
    """Tensors that have other zeros than the manifest says, or are not in it."""
    wrong, known = [], {s.name: s for s in store.every()}
    for name, spec in known.items():
        look = Look(spec)
        for part in store.parts(spec, "chunk"):
            look.at(part)
        if (found := look.found().zeros) != zeros.get(name):
            wrong.append(f"{name} has {found} zeros, and the manifest says {zeros.get(name)}")
    return wrong + [f"{name} is not there" for name in sorted(set(zeros) - set(known))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False
