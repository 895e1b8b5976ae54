"""Without the extension everything works through the torch twins, and gives the same masks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from secateur import native
from tests.guard.source import ROOT
from tests.integration.prune_a_model import DTYPES, WAYS, results


def child(**environ: str) -> dict[str, Any]:
    """What the script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.prune_a_model"],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.skipif(not os.environ.get("SECATEUR_REQUIRE_NATIVE"), reason="only where the native build is required")
def test_the_extension_is_there_where_it_is_required() -> None:
    assert native.available()


def test_the_twins_give_the_same_masks() -> None:
    here, twin = results(), child(SECATEUR_NATIVE="0")
    assert twin["native"] is False
    for dtype in DTYPES:  # no two ways of pruning leave the same masks, so equal digests mean something
        assert len({here[f"{dtype} {way}"] for way in WAYS}) == len(WAYS)
    assert here == twin["masks"]
