"""The benchmarks measure what they say: bars that can be missed, turns, children, and quoting into the docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import child, export, machine, memory, probes, speed
from benchmarks.models import FULL_WIDTH, encoder, fill, weights_of, width_for
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Timing, take_turns


def a_result() -> Result:
    return Result(
        "speed", "python -m …", machine.machine(0.5), [Table("T", ("<a", "b"), [("x", "1")])], [Bar("x", 2, 1)]
    )


def test_bars_can_be_missed() -> None:
    assert Bar("time", 2.9, 3).reached
    assert not Bar("time", 3, 3).reached
    assert Bar("faster", 200, 200, at_least=True).reached
    assert not Bar("faster", 199, 200, at_least=True).reached
    assert a_result().all_tables()[-1].rows == [("x", "2", "< 1", "MISSED")]


def test_the_model_is_the_one_the_bars_are_about() -> None:
    model = encoder(FULL_WIDTH, torch.float32)
    shapes = [p.shape for p in model.parameters() if p.ndim == 2]
    assert len(shapes) == 110
    assert sum(s.numel() for s in shapes) == weights_of(FULL_WIDTH) == 115_006_528
    assert all(s[1] % 4 == 0 for s in shapes)
    assert abs(weights_of(width_for(1_000_000_000)) / 1e9 - 1) < 0.02


def test_filling_again_gives_the_same_dense_values() -> None:
    model = encoder(16, torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    speed.timed(model, {"global": speed.WAYS["global"]}, 1)
    assert any((p == 0).any() for p in model.parameters())
    fill(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_turns_are_taken() -> None:
    calls: list[str] = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, lambda: calls.append("-"), 2)
    assert "".join(calls) == "-a-b" * 3
    assert [len(t.seconds) for t in found.values()] == [2, 2]
    assert Timing((2.0, 6.0)).per(Timing((1.0, 2.0))) == [2.0, 3.0]


def test_a_child_tells_what_it_held() -> None:
    found = child.call("benchmarks.memory", "peak", width=16, dtype="float32", way="2:4")
    assert found["peak"] >= found["held"] > 0
    with pytest.raises(RuntimeError, match="no_such"):
        child.call("benchmarks.memory", "no_such")


def test_memory_that_is_taken_is_seen() -> None:
    before = machine.held_bytes()
    taken = torch.ones(25_000_000)
    assert machine.held_bytes() - before > 0.9 * taken.nbytes
    assert machine.peak_bytes() >= machine.held_bytes()


def test_every_way_has_its_bars() -> None:
    assert set(speed.WAYS) == set(speed.MOST_READS) == set(speed.LEAST_TIMES_FASTER)
    assert memory.MOST_PERCENT == 5


def test_results_are_written_and_quoted(tmp_path: Path) -> None:
    result, page = a_result(), tmp_path / "page.md"
    result.write(tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["reached"] == {"x": False}
    page.write_text("above\n<!-- speed -->\nold\n<!-- end of speed -->\nbelow\n", encoding="utf-8")
    command.quote(result, page)
    command.quote(result, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n<!-- speed -->\n`python -m …`, on ")
    assert text.count("| x | 1 |") == 1
    assert "old" not in text
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit):
        command.quote(result, page)


def test_the_pages_have_a_place_for_each() -> None:
    pages = {getattr(m, "PAGE", command.PAGE) for m in command.ALL.values()} - {probes.PAGE}
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    places = re.findall(r"<!-- (\w+) -->.*?<!-- end of \1 -->", text, re.S)
    assert sorted(places) == sorted(set(command.ALL) - {"probes"})


def test_a_ratio_is_of_the_dense_run_by_the_pruned_one() -> None:
    line = export._line("b", {"b": Timing((1.0,)), "a": Timing((2.0,)), "torch, dense": Timing((3.0,))}, "a")
    assert line == ("b", "1e+03 (1e+03–1e+03)", "2 (2–2)", "3 (3–3)")


@pytest.mark.slow
def test_exports_are_weighed_and_timed(tmp_path: Path) -> None:
    called = list(export.installed())
    table = export.sizes(64, tmp_path)
    assert [row[0] for row in table.rows] == called
    assert dict(zip(called, (row[-1] for row in table.rows), strict=True))["safetensors"] == "1.00"
    found, _ = export.candidates(64, tmp_path)
    assert all(base in found for base, _ in found.values())
