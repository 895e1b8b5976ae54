"""Reads the project's own files for the guard tests."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
UNTRACKED = {"build", "dist", "runs", "__pycache__"}


def tracked() -> list[Path]:
    """Files of the project: what git knows or would add; without git, all but the usual leftovers."""
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if git.returncode == 0:
        paths = [ROOT / line for line in git.stdout.splitlines()]
    else:
        paths = [p for p in ROOT.rglob("*") if not any(_leftover(s) for s in p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file()]


def _leftover(step: str) -> bool:
    return step in UNTRACKED or (step.startswith(".") and step not in (".ci", ".gitignore"))


def text(path: Path) -> str:
    """A file's text; bytes that are not UTF-8 (a picture, a weights file) are dropped."""
    return path.read_text(encoding="utf-8", errors="ignore")


@dataclass(frozen=True)
class Import:
    """One imported module, seen from the module that imports it.

    Attributes:
        by, line: the importing module's dotted name, and where in its file.
        name: the imported dotted name, absolute; of ``from a import b`` it is ``a.b``.
        eager: whether importing ``by`` imports it too: outside functions, and not for type checkers only.
    """

    by: str
    line: int
    name: str
    eager: bool

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.name}"


def module_name(path: Path, src: Path) -> str:
    """``src/a/b.py`` -> ``a.b``; ``src/a/__init__.py`` -> ``a``."""
    parts = path.relative_to(src).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(src: Path = SRC) -> list[Path]:
    """Every Python file below ``src``, in order."""
    return sorted(src.rglob("*.py"))


def imports(path: Path, src: Path = SRC) -> list[Import]:
    """Every import of a file, wherever it stands."""
    by = module_name(path, src)
    package = by if path.name == "__init__.py" else by.rpartition(".")[0]
    return [
        Import(by, node.lineno, name, eager)
        for node, eager in _import_nodes(ast.parse(text(path)), eager=True)
        for name in _names(node, package)
    ]


def _import_nodes(node: ast.AST, eager: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, eager
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _import_nodes(child, eager=False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _import_nodes(ast.Module(child.body, []), eager=False)
            yield from _import_nodes(ast.Module(child.orelse, []), eager)
        else:
            yield from _import_nodes(child, eager)


def _names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    return [f"{base}.{a.name}" for a in node.names]
