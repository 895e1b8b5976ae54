"""What programs that kill their children at a file operation have in common."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = [
    (os, "open"), (os, "fsync"), (os, "link"), (shutil, "copyfile"), (Path, "open"), (Path, "rename"), (Path, "replace"),
    (Path, "mkdir"), (Path, "unlink"), (os, "unlink"), (os, "rmdir"), (os, "rename"), (os, "mkdir"), (os, "write"),
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
