"""Timings: turns, medians of ratios with their intervals, and what is left as it was."""

from __future__ import annotations

import gc
import platform
import random
import statistics

import pytest
import torch

from secateur.runtime import machine, timing
from secateur.runtime.timing import Ratio, Timing, quiet, take_turns, threads


def test_turns() -> None:
    calls: list[str] = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4
    assert [len(t.seconds) for t in found.values()] == [3, 3]
    assert all(s > 0 for t in found.values() for s in t.seconds)


def test_the_interval_holds_the_median() -> None:
    """19 times in 20 or more, whatever the distribution: here one with a long tail."""
    draw = random.Random(0)
    for n in (6, 9, 15, 30):
        held = 0
        for _ in range(1000):
            r = Ratio.of([draw.expovariate(1.0) for _ in range(n)])
            assert r.low <= r.median <= r.high
            held += r.low <= 0.6931 <= r.high
        assert held / 1000 > 0.935


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_interval_of_few_values_is_all_of_them(n: int) -> None:
    values = [float(i) for i in range(n)]
    assert Ratio.of(values) == Ratio(statistics.median(values), 0.0, n - 1.0)


def test_more_values_make_it_narrower() -> None:
    few, many = (Ratio.of([float(i) / n for i in range(n)]) for n in (9, 99))
    assert many.high - many.low < few.high - few.low


def test_words() -> None:
    assert str(Ratio(1.5, 1.25, 2.0)) == "1.50 (1.25–2.00)"
    t = Timing((0.001, 0.002, 0.004))
    assert (t.median, t.milliseconds(), t.per(t)) == (0.002, "2 (1–4)", [1.0] * 3)


def test_what_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1), quiet():
        assert torch.get_num_threads() == before + 1
        assert not gc.isenabled()
        assert torch.is_inference_mode_enabled()
        raise KeyError
    assert torch.get_num_threads() == before
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_the_machine_is_named() -> None:
    found = machine.machine()
    assert found.processor
    assert found.processor in str(found)
    assert found.threads == torch.get_num_threads()
    assert f"torch {torch.__version__}" in str(found)
    assert 1 << 15 <= machine.core_cache_bytes() <= machine.cache_bytes() <= 1 << 34


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    none = tmp_path_factory.mktemp("none") / "none"
    for name in ("CACHES", "INFO", "STATUS"):
        monkeypatch.setattr(machine, name, none)
    machine.processor.cache_clear()
    assert (machine.cache_bytes(), machine.core_cache_bytes()) == (machine.USUAL_CACHE, machine.USUAL_CORE_CACHE)
    assert machine.processor() == (platform.processor() or platform.machine())
    assert machine.resident_bytes() is None
    machine.processor.cache_clear()


def test_garbage_is_not_timed() -> None:
    gc.disable()
    try:
        with timing.quiet():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
