"""The benchmarks measure what they say: bars that can be missed, turns, children, and quoting into the docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import child, endtoend, export, machine, memory, packed, runtime, runtimes, speed, tuned
from benchmarks.models import FULL_WIDTH, encoder, fill, weights_of, width_for
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Timing, take_turns
from secateur.runtime.table import Table as Measured
from secateur.runtime.table import active, using
from secateur.runtime.tune import Size


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


@pytest.mark.slow
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


def test_the_pages_have_a_place_for_each() -> None:
    for page in {command.PAGE, *command.PAGES.values()}:
        text = page.read_text(encoding="utf-8")
        places = set(re.findall(r"<!-- (\w+) -->.*?<!-- end of \1 -->", text, re.S))
        assert places - {"simulate"} == {n for n in command.ALL if command.PAGES.get(n, command.PAGE) == page} - {
            "probes"
        }


def test_products_are_timed_side_by_side() -> None:
    """The quick form: every candidate at every point, and what packing uses among them."""
    cells = runtime.measured(runtime.QUICK)
    assert len(cells) == 4
    for c in cells:
        assert {runtime.BASE, runtime.FLOAT, runtimes.TORCH_CSR, *c.used.values()} <= set(c.times)
        assert all(s > 0 for t in c.times.values() for s in t.seconds)
        assert c.faster(runtime.BASE, runtime.BASE).median == 1
    (table,) = runtime.tables_of(cells)
    assert len(table.rows) == 4
    assert all(len(row) == len(table.heads) for row in table.rows)


@pytest.mark.parametrize("amx", [True, False])
def test_goals_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    """Given times, the bars that are missed are those that should be."""
    monkeypatch.setattr(runtime, "key", lambda dtype: "avx512bf16+amx" if amx else "avx512bf16+bf16")
    one, two = Timing((1.0,)), Timing((2.0,))
    names = {d: runtime.our_name("bitmask", d) for d in (torch.bfloat16, torch.float32)}
    times = {runtime.BASE: two, runtime.FLOAT: two, **dict.fromkeys(names.values(), one)}
    times |= {runtime.our_name(la, torch.bfloat16, "avx2"): t for la, t in (("bitmask", one), ("csr", two))}
    cells = [runtime.Cell(runtime.SHAPE, s, 1, 1, times, names) for s in (0.5, 0.8, 0.9)]
    reached = {b.what: b.reached for b in runtime.bars_of(cells)}
    assert reached["1 row, 90%, float32: times dense float32"] is False
    assert reached["whatever is packed, at worst: times dense of its dtype"] is True
    assert reached["1 row, float32, at worst: times the best of the others"] is True
    if amx:
        assert reached["1 row, 50%, bfloat16: times torch bfloat16"] is True
        assert reached["1 row, 80%, bfloat16: times torch bfloat16"] is False
    else:
        assert reached["1 row, 80%, by AVX2, bitmask: times torch bfloat16"] is True
    packed_slowly = [
        runtime.Cell(runtime.SHAPE, 0.5, 1, 1, times | dict.fromkeys(names.values(), Timing((3.0,))), names)
    ]
    assert not any(b.reached for b in runtime.bars_of(packed_slowly) if "by AVX2" not in b.what)


def test_whole_models_are_timed_side_by_side() -> None:
    """The quick form: an encoder and a decoder with a cache, dense and packed, with what lies outside linear layers."""
    pytest.importorskip("transformers")
    known, *tables = endtoend.run(False, quick=True).tables
    assert [row[0] for row in known.rows] == ["bfloat16", "float32"]
    assert [t.title for t in tables] == [endtoend.ENCODER, endtoend.LANGUAGE]
    for table in tables:
        text = " ".join(row[0] for row in table.rows)
        assert all(name in text for name in ("dense bfloat16", "packed bfloat16", "dense float32", "packed float32"))
        assert text.count("the faster dense one") == 1
        assert all(float(row[1]) > 0 and 0 <= float(row[4].rstrip("%")) <= 100 for row in table.rows)


@pytest.mark.slow
def test_where_no_table_knows_the_processor_one_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.candidates.MOST_COPIES", 2)
    with using(Measured(())):
        with tuned.in_use(Size((16,), (0.1,), (1,), 3)) as said:
            assert all(active().grid(d) is not None for d in tuned.DTYPES)
            assert all("by this benchmark, before it began" in row[1] for row in said.rows)
            with tuned.in_use() as again:
                assert all(row[1].startswith("before: ") for row in again.rows)
        with tuned.in_use(None) as said:
            assert [row[1] for row in said.rows] == ["nothing; all stays dense"] * 2


def test_goals_of_whole_models() -> None:
    """Given times, the bars that are missed are those that should be."""
    names = ("dense bfloat16", "dense float32", "packed bfloat16", "packed float32")

    def cell(job: str, threads: int, *seconds: float) -> endtoend.Cell:
        return endtoend.Cell(job, 0.8, threads, {n: Timing((s,)) for n, s in zip(names, seconds, strict=True)}, {}, {})

    encoder = endtoend.bars_of([cell(endtoend.ENCODER, 1, 1.0, 3.0, 0.9, 9.0)])
    assert [(round(b.found, 2), b.limit, b.reached) for b in encoder] == [(1.11, 1.0, True), (3.33, 2.5, True)]
    language = endtoend.bars_of([cell(endtoend.LANGUAGE, n, 1.6, 1.5, 1.2, 1.0) for n in (1, 2)])
    assert [(b.found, b.limit, b.reached) for b in language] == [(1.5, 1.6, False), (1.5, 1.4, True)]
    assert "times dense float32" in language[0].what


def test_other_runtimes_multiply_the_same() -> None:
    weight, x = torch.eye(24, 32), torch.arange(64.0).view(2, 32) / 64
    for rows in (x, x[:1]):
        torch.testing.assert_close(runtimes.torch_csr(weight)(rows), rows @ weight.t())
    absent = runtimes.missing()
    if runtimes.ORT not in absent:
        torch.testing.assert_close(runtimes.onnxruntime(weight, 1)(x), x @ weight.t())
    if runtimes.OPENVINO not in absent:
        found, kind = runtimes.openvino(weight, 2, 1)
        assert "8" in kind
        torch.testing.assert_close(found(x), x @ weight.t(), atol=0.05, rtol=0.05)


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
