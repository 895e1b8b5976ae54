"""The study of channels and heads in its quick form: counts to the unit, what is silent stays silent, differences are paired."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import channels, encoder, heads, structures
from benchmarks.evidence.common import Setup, using

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("few_nouns")

WIDTHS = (20, 20, 40, 40, 80, 80)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("structures")


def results(out: Path) -> list[dict[str, Any]]:
    """What the study finds for seeds 0 and 1; made once."""
    command.main(["structures", "--quick", "--seeds", "0,1", "--out", str(out)])
    with using(Setup(reading=True)):
        return [structures.run_seed(s, out / "quick" / "structures" / f"seed-{s}", True) for s in (0, 1)]


def test_counts_are_exact_and_what_is_gone_stays_gone(out: Path) -> None:
    found = results(out)
    assert [len(r) for r in found] == [1 + 14 + 1 + 1 + 16, 1 + 14 + 1 + 8]
    for cell, facts in ((n, c) for r in found for n, c in r.items()):
        kind, method, *rest = cell.split("-")
        if method in ("dense", "by"):
            assert not any(facts.get("gone", {}).values())
        elif kind == "channels":  # after tuning, in the norms too
            assert list(facts["gone"].values()) == [round(float(rest[0]) * w) for w in WIDTHS], cell
        else:  # two layers of four heads
            assert (facts["gone"], facts["heads"]) == ({"0.3": 2, "0.5": 4}[rest[1]], 8), cell


def test_a_cell_is_made_again_as_it_was(out: Path) -> None:
    results(out)
    seed = out / "quick" / "structures" / "seed-1"
    before = {p: json.loads(p.read_text("utf-8")) for p in seed.glob("*.json")}
    again = [seed / "channels-taylor-0.5.json", seed / "heads-importance-global-0.5.json"]
    for path in again:
        path.unlink()
    heads.gradients.cache_clear()
    results(out)
    after = {p: json.loads(p.read_text("utf-8")) for p in seed.glob("*.json")}
    assert all(after[p]["result"] == before[p]["result"] for p in again)
    assert all(after[p] == before[p] for p in before if p not in again)


def moved(found: Any) -> Any:
    """The same with every accuracy ten points higher."""
    if not isinstance(found, dict):
        return copy.deepcopy(found)
    return {k: v + 10.0 if k == "accuracy" else moved(v) for k, v in found.items()}


def test_differences_of_channels_are_paired(out: Path) -> None:
    first = results(out)[0]
    second = moved({n: c for n, c in first.items() if n.startswith("channels")})
    tables = channels.tables([first, second])
    assert [len(table.rows) for table in tables] == [8, 6, 6, 8]
    texts = [text for table in tables for row in table.rows for text in row[1:] if text]
    differences = [text for text in texts if text[0] in "+-"]
    assert len(differences) == 6 * 4 + 6 * 4 + 6 * 3
    assert all(text.endswith("± 0.00") for text in differences)
    assert all(text.endswith("± 63.53") for text in texts if text not in differences)  # 10 / √2 · t(0.975, 1) / √2


def score(value: float, draw: float) -> dict[str, Any]:
    found = {"score": value, "draws": [draw], "n": 5}
    return {"model": "M", "gone": 2, "scores": {t: found for t in encoder.TESTS}}


def test_heads_are_compared_with_magnitude_draw_by_draw_and_with_chance_seed_by_seed() -> None:
    cells = {heads.DENSE: score(0.9, 0.9), "heads-l1-global-0.5": score(0.5, 0.2)}
    seeds = [
        {**cells, "heads-random-global-0.5": score(0.3, 0.3), "heads-importance-global-0.5": score(0.6, 0.4)},
        {"heads-random-global-0.5": score(0.1, 0.1), "heads-importance-global-0.5": score(0.8, 0.6)},
    ]
    levels, above, beyond = (table.rows for table in heads.tables(seeds))
    assert levels[0] == ("dense", "0", *["90.0"] * 3)
    assert levels[1] == ("50%, global, magnitude, l1", "2", *["50.0"] * 3)
    assert above[0] == ("50%, global, head importance", *["+20.0 (+30.0 to +30.0)"] * 3)
    assert beyond[0] == ("50%, global, magnitude, l1", *["+30.0 ± 127.1"] * 3)  # 20 and 40
    assert beyond[1] == ("50%, global, head importance", *["+50.0 ± 254.1"] * 3)  # 30 and 70


def test_the_loss_of_heads_has_a_gradient_and_sees_nothing_that_is_tested() -> None:
    size = encoder.QUICK
    subject = encoder.subject_of(size)
    measured = heads.gradients(0, size)
    assert all(float(t.min()) > 0 for values in measured.values() for t in values.values())
    tested = {tuple(t) for t in (*subject.words, *subject.definitions)}
    for sides in heads.pairs(subject, size, 0):
        for side in sides:
            texts = (ids[mask.bool()] for ids, mask in zip(side["input_ids"], side["attention_mask"], strict=True))
            assert not tested & {tuple(t.tolist()) for t in texts}
