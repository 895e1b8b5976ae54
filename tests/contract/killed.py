"""Prunes a checkpoint over an old result, once for every file operation, killed at it; prints what was left.

A program of its own: it forks, and each child ends by SIGKILL at its n-th file operation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.stores import staging

OPERATIONS = [
    (os, "open"), (os, "fsync"), (os, "link"), (shutil, "copyfile"), (Path, "open"), (Path, "rename"), (Path, "replace"),
    (Path, "mkdir"), (Path, "unlink"), (os, "unlink"), (os, "rmdir"), (staging, "_exchange"),
]  # fmt: skip


def digest(path: Path) -> str:
    """One hash of a file, or of a folder's names and bytes; nothing for what is not there."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    h = hashlib.sha256()
    for p in files:
        h.update(f"{p.relative_to(path.parent)} ".encode() + p.read_bytes())
    return h.hexdigest() if files else ""


def deadly(n: int) -> None:
    """Makes the n-th file operation of this process its last."""
    seen = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return operation

    for owner, name in OPERATIONS:
        setattr(owner, name, wrap(getattr(owner, name)))


def in_child(work: Callable[[], object]) -> int:
    """Runs something in a child and returns how it ended: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left_by(source: Path, out: Path, overwrite: bool) -> dict[str, Any]:
    """``{"old": hash, "new": hash, "source": hash, "left": [[n, hash of out, hash of source, strays]], "endings": […]}``."""

    def prune() -> None:
        secateur.prune(source, 0.75, out=out, overwrite=overwrite)

    def restore() -> None:
        for path in (out, *out.parent.glob(f".{out.name}.*")):
            staging._remove(path)
        if overwrite:
            secateur.prune(source, 0.25, out=out)

    restore()
    old = digest(out)
    prune()
    new = digest(out)
    left, endings = [], []
    for n in range(1, 500):
        restore()

        def killed(n: int = n) -> None:
            deadly(n)
            prune()

        endings.append(in_child(killed))
        left.append([n, digest(out), digest(source), len(list(out.parent.glob(".*")))])
        if endings[-1] != -signal.SIGKILL:
            break
    return {"old": old, "new": new, "source": digest(source), "left": left, "endings": endings}


if __name__ == "__main__":
    torch.set_num_threads(1)
    paths = Path(sys.argv[1]), Path(sys.argv[2])
    print(json.dumps({"new": left_by(*paths, overwrite=False), "over": left_by(*paths, overwrite=True)}))
