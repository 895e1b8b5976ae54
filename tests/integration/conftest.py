"""A WordNet of sixty nouns, for the studies that read the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import sources

DEFINITIONS = ("a tool with two handles for cutting plants", "the part of a ship where goods are stowed away")


@pytest.fixture(scope="session")
def nouns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of WordNet's kind, of sixty nouns and two lines of the licence."""
    path = tmp_path_factory.mktemp("wordnet") / "data.noun"
    words = [a + b for a in ("stone", "river", "garden", "winter", "copper", "market") for b in ("", *"abcdefghi")]
    lines = ["  1 This software and database is being provided to you ", "  2 Princeton University  "]
    for i, word in enumerate(words):
        gloss = f'{DEFINITIONS[i % 2]} of kind {i}; "an example of {word}"  '
        lines.append(f"{i:08d} 03 n 02 {word} 0 other_{i} 0 001 @ 00001740 n 0000 | {gloss}")
    path.write_text("\n".join(lines), "ascii")
    return path


@pytest.fixture
def few_nouns(nouns: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The studies read those, on one thread."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sources, "NOUNS", nouns)
    sources.meanings.cache_clear()
    yield
    sources.meanings.cache_clear()
