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

LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
MACHINE = re.compile(r"(?<![\w.~])/(?:work|root|home/\w+|opt/\w+)/|/tmp/\w*jobs")
COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)")


def sources() -> list[Path]:
    """The package's own code, Python and C++."""
    return [p for folder in (SRC, ROOT / "csrc") for p in sorted(folder.rglob("*")) if p.suffix in CODE]


def lines_with(pattern: re.Pattern[str], path: Path) -> list[str]:
    found = enumerate(text(path).splitlines(), 1)
    return [f"{path.name}:{n}: {line.strip()[:90]}" for n, line in found if pattern.search(line)]


def long_functions(path: Path) -> list[str]:
    """Functions with too many lines; a docstring says as much as it has to and is not counted."""
    found = []
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[:1] if ast.get_docstring(node) else []
            size = lines_of(node) - sum(lines_of(d) for d in doc)
            if size > LONGEST_FUNCTION:
                found.append(f"{path.name}: {node.name} has {size} lines")
    return found


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def commands(markdown: str) -> set[str]:
    """Targets of make that a page shows as code."""
    code = re.findall(r"```.*?```|`[^`\n]+`", markdown, re.S)
    return {target for block in code for target in COMMAND.findall(block)}


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))


def test_nothing_that_was_built_or_downloaded_is_kept() -> None:
    kept = [
        p.name
        for p in tracked()
        if p.suffix in (".whl", ".so", ".o", ".gz", ".zip", ".safetensors", ".pt", ".bin", ".onnx")
    ]
    assert not kept


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
    body = ["def f():", "    'Doubles.'", *["    pass"] * LONGEST_FUNCTION]
    folder = "/".join(["", "work", "data"])
    path = tmp_path / "a.py"
    path.write_text("\n".join([*body, f"x = '{folder}'  # TODO"]))
    assert len(long_functions(path)) == 1
    assert len(lines_with(LEFTOVER, path)) == 1
    assert len(lines_with(MACHINE, path)) == 1
    assert commands("make it, `make run`, or\n```\nmake no-such\n```") == {"run", "no-such"}
    assert targets("run: x\n\trun\nVAR := y\n") == {"run"}
