"""The benchmarks measure what they say: bars that can be missed, turns, children, and quoting into the docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import child, machine, memory, packed, speed
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


def test_the_speed_of_packing_is_measured_of_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WIDTHS", {False: 64})
    table, bars = packed.speeds(tmp_path, False, 1)
    assert [row[:2] for row in table.rows] == [
        (f"{dtype}, {share}", encoding)
        for dtype in ("float32", "bfloat16")
        for share, encoding in (("50%", "bitmask"), ("80%", "bitmask"), ("95%", "bitmask"))
    ]
    assert len(bars) == 24 and all(b.at_least and b.limit == 500 and b.found > 0 for b in bars)
    zeros = [float((packed.pruned(64, torch.float32, s) == 0).float().mean()) for s in (0.5, 0.95)]
    assert abs(zeros[0] - 0.5) < 0.05 > abs(zeros[1] - 0.95)


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


def test_the_page_has_a_place_for_each() -> None:
    text = command.PAGE.read_text(encoding="utf-8")
    places = set(re.findall(r"<!-- (\w+) -->.*?<!-- end of \1 -->", text, re.S))
    assert places == set(command.ALL) - {"probes"}
