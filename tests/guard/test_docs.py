"""What the docs show runs, as it stands there, and shows every public name. The README has a test of its own."""

from __future__ import annotations

import doctest
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurWarning
from tests.guard.source import ROOT, text

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of its first line, code) of every Python block of a page."""
    found = text(page)
    return [(found.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(found)]


def run(page: Path) -> list[str]:
    """Runs all blocks of a page as one session, and says what did not come out as shown."""
    names: dict[str, Any] = {"__name__": "docs"}
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    failures: list[str] = []
    for line, code in blocks(page):
        if ">>> " in code:
            shown = doctest.DocTestParser().get_doctest(code, names, f"{page.name}:{line}", str(page), line)
            runner.run(shown, out=failures.append, clear_globs=False)
            names = shown.globs
        else:
            exec(compile("\n" * line + code, page.name, "exec"), names)
    return failures


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_its_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # pages write files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)  # pages show what is warned about
        failures = run(page)
    assert not failures, "".join(failures)


def test_every_public_name_is_shown_in_use() -> None:
    code = "\n".join(block for page in PAGES for _, block in blocks(page))
    missing = [n for n in secateur.__all__ if not re.search(rf"\b(secateur\.|errors\.){n}\b", code)]
    assert not missing


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links write them."""
    kept = (re.sub(r"[^\w\- ]", "", h.lower()) for h in HEADING.findall(text(page)))
    return {h.strip().replace(" ", "-") for h in kept}


def dead_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    dead = []
    for link in LINK.findall(text(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_its_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall(text(ROOT / "docs" / "index.md")))
    assert not {p.name for p in PAGES} - listed - {"index.md"}


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\n>>> x = 1\n>>> x + 1\n3\n```\n\n[a](#a-page) [b](#b) [c](none.md)\n")
    assert "Expected:\n    3\nGot:\n    2" in "".join(run(page))
    assert dead_links(page) == ["#b", "none.md"]
    page.write_text("```python\nx = 1\n```\n\n```python\n>>> x\n1\n```\n")
    assert not run(page)
    page.write_text("```python\nx = 1\nraise KeyError(x)\n```\n")
    with pytest.raises(KeyError):
        run(page)
