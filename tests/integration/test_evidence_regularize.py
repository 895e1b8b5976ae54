"""The study of regularisation chooses no λ by the test pictures."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.evidence import regularize as study


def cell(method: str, strength: float, held_out: float, test: float) -> dict[str, Any]:
    scores = {s: {"held out": held_out, "test": test} for s in ("0", "0.8", "0.9")}
    return {
        "method": method,
        "strength": strength,
        "data": "D",
        "pictures": 9000,
        "zero": 0.25,
        "zero channels": 0.0,
        **scores,
    }


def test_a_strength_is_chosen_by_the_pictures_held_out() -> None:
    results = [
        {
            "none": cell("none", 0.0, 70.0, 70.0 + seed),
            "L1-proximal-0.1": cell("L1, proximal", 0.1, 80.0, 75.0 + seed),
            "L1-proximal-0.3": cell("L1, proximal", 0.3, 79.0, 90.0),
        }
        for seed in (0, 1, 2)
    ]
    (curve, picked), (bar,) = study.summary(json.loads(json.dumps(results)))
    assert curve.rows[0] == ("none", "", "25.0", "0.0", *["71.00 ± 2.48"] * 3)
    assert picked.rows == [("L1, proximal", *["0.1", "76.00 ± 2.48", "+5.00 ± 0.00"] * 2)]
    assert bar.found == 5.0 and bar.reached
