"""The study of regularisation runs in its quick form, goes on from what it finished, and chooses no λ by the test pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import regularize as study


@pytest.mark.usefixtures("_one_thread")
def test_it_goes_on_from_what_is_there_and_comes_out_the_same(tmp_path: Path) -> None:
    found = study.run_seed(0, tmp_path, quick=True)
    assert [c["method"] for c in found["cells"]] == [study.NONE, *study.METHODS]
    files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(files) == len(found["cells"])
    gone = next(p for p in files if "L1-proximal" in p.name)
    gone.unlink()
    assert study.run_seed(0, tmp_path, quick=True) == found
    assert {p for p in files if p.stat().st_mtime_ns != files[p]} == {gone}, "the others were read"
    tables, bars = study.summary([found])
    assert len(tables[0].rows) == 5 and len(tables[1].rows) == 4 and len(bars) == 1
    for cell in found["cells"]:
        assert [round(cell[s]["sparsity"], 4) for s in ("0.8", "0.9")] == [0.8, 0.9]
        assert cell["0"]["test"] > 20, "it has learned something"


@pytest.fixture
def _one_thread() -> None:
    """Sums depend on the number of threads."""
    import torch

    torch.set_num_threads(1)


def cell(method: str, strength: float, held_out: float, test: float) -> dict[str, Any]:
    scores = {s: {"held out": held_out, "test": test} for s in ("0", "0.8", "0.9")}
    return {"method": method, "strength": strength, "zero": 0.25, "zero channels": 0.0, **scores}


def test_a_strength_is_chosen_by_the_pictures_held_out() -> None:
    results = [
        {
            "seed": seed, "data": "D", "pictures": 9000,
            "cells": [
                cell("none", 0.0, 70.0, 70.0 + seed),
                cell("L1, proximal", 0.1, 80.0, 75.0 + seed),
                cell("L1, proximal", 0.3, 79.0, 90.0),
            ],
        }
        for seed in (0, 1, 2)
    ]  # fmt: skip
    (curve, picked), (bar,) = study.summary(json.loads(json.dumps(results)))
    assert curve.rows[0] == ("none", "", "25.0", "0.0", *["71.0 ± 2.5"] * 3)
    assert picked.rows == [("L1, proximal", *["0.1", "76.0 ± 2.5", "+5.0 ± 0.0"] * 2)]
    assert bar.found == 5.0 and bar.reached
