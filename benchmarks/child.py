"""Runs a function of this package in a fresh process and brings back what it returns."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_RUN = (
    "import importlib, json, sys\n"
    "module, function, arguments = json.loads(sys.argv[1])\n"
    "print(json.dumps(getattr(importlib.import_module(module), function)(**arguments)))"
)


def call(module: str, function: str, **arguments: Any) -> Any:
    """``function(**arguments)`` of ``module``, in a process of its own; arguments and result travel as JSON."""
    return script(_RUN, json.dumps([module, function, arguments]))


def script(code: str, *arguments: str) -> Any:
    """Runs Python code in a process of its own; its last line is JSON."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a child process failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
