"""House rules a machine can check: sizes, leftovers, one version, no paths of anybody's machine."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import secateur
from tests.guard.source import ROOT, SRC, modules, text, tracked

CODE = (".py", ".cpp", ".hpp", ".h", ".cc")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60

LEFTOVER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b|raise NotImplemented" r"Error")
MACHINE = re.compile(r"(?<![\w.~])/(?:work|root|home/\w+|opt/\w+)/|/tmp/\w*jobs")
COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)")


def sources() -> list[Path]:
    """The package's own code, Python and C++."""
    return [p for folder in (SRC, ROOT / "csrc") for p in sorted(folder.rglob("*")) if p.suffix in CODE]


def lines_with(pattern: re.Pattern[str], path: Path) -> list[str]:
    found = enumerate(text(path).splitlines(), 1)
    return [f"{path.name}:{n}: {line.strip()[:90]}" for n, line in found if pattern.search(line)]


def long_functions(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(text(path)))
    functions = (n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    sizes = ((f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions)
    return [f"{path.name}: {name} has {size} lines" for name, size in sizes if size > LONGEST_FUNCTION]


def commands(markdown: str) -> set[str]:
    """Targets of make that a page shows as code."""
    code = re.findall(r"```.*?```|`[^`\n]+`", markdown, re.S)
    return {target for block in code for target in COMMAND.findall(block)}


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))


def test_files_are_short() -> None:
    assert not [f"{p.name}: {n} lines" for p in sources() if (n := len(text(p).splitlines())) > LONGEST_FILE]


def test_functions_are_short() -> None:
    assert not [long for path in modules() for long in long_functions(path)]


def test_nothing_is_left_for_later() -> None:
    assert not [line for path in sources() for line in lines_with(LEFTOVER, path)]


def test_every_folder_is_a_package() -> None:
    folders = {p.parent for p in (SRC / "secateur").rglob("*.py")}
    assert not [str(f.relative_to(SRC)) for f in folders if not (f / "__init__.py").exists()]
    assert (SRC / "secateur" / "py.typed").exists()


def test_one_version() -> None:
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["version"]
    changelog = re.search(r"^## (\d+\.\d+\.\d+)", text(ROOT / "CHANGELOG.md"), re.M)
    citation = re.search(r"^version: (\S+)", text(ROOT / "CITATION.cff"), re.M)
    assert changelog
    assert citation
    assert project == changelog.group(1) == citation.group(1) == secateur.__version__


def test_no_paths_of_a_machine() -> None:
    assert not [line for path in tracked() for line in lines_with(MACHINE, path)]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_exist(page: str) -> None:
    shown = commands(text(ROOT / page))
    assert shown
    assert shown <= targets(text(ROOT / "Makefile"))


def test_violations_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    body = "\n".join(["def f():", *["    pass"] * LONGEST_FUNCTION, "# TODO", "x = '/work/data'"])
    path.write_text(body)
    assert len(long_functions(path)) == 1
    assert len(lines_with(LEFTOVER, path)) == 1
    assert len(lines_with(MACHINE, path)) == 1
    assert commands("make it, `make run`, or\n```\nmake no-such\n```") == {"run", "no-such"}
    assert targets("run: x\n\trun\nVAR := y\n") == {"run"}
