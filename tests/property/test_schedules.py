"""Promise 8: schedules end where they said, whatever the frequency, and stay between their ends on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from secateur import schedules

SPARSITIES = st.sampled_from([0.0, 0.5, 0.9, 0.95]) | st.floats(0, 1, exclude_max=True)


@st.composite
def ways(draw: st.DrawFn) -> schedules.Polynomial | schedules.Exponential:
    initial, target = sorted((draw(SPARSITIES), draw(SPARSITIES)))
    begin = draw(st.integers(0, 50))
    more = {
        "begin": begin,
        "end": begin + draw(st.integers(1, 60)),
        "every": draw(st.integers(1, 90)),
        "initial": initial,
    }
    if draw(st.booleans()):
        return schedules.exponential(target, **more)
    return schedules.polynomial(target, **more, power=draw(st.floats(0.1, 9)))


@given(ways(), st.integers(0, 10**9))
def test_the_last_value_is_the_target_whatever_the_frequency(s: schedules.Polynomial, later: int) -> None:
    assert s(s.end) == s(s.end + later) == s.target


@given(ways())
def test_values_rise_from_initial_to_target(s: schedules.Polynomial) -> None:
    values = [s(t) for t in range(s.end + 3)]
    assert values[: s.begin] == [0.0] * s.begin
    rising = values[s.begin :]
    assert rising == sorted(rising)
    assert all(s.initial <= v <= s.target for v in rising), (min(rising), max(rising))


@given(ways())
def test_values_change_at_updates_only(s: schedules.Polynomial) -> None:
    for t in range(s.begin + 1, s.end + 3):
        if (t - s.begin) % s.every and t != s.end:
            assert s(t) == s(t - 1)


@given(SPARSITIES, st.integers(0, 9), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_ac_dc_is_sparse_or_dense_and_ends_sparse(
    target: float, begin: int, length: int, sparse: int, dense: int
) -> None:
    s = schedules.ac_dc(target, begin=begin, end=begin + length, sparse=sparse, dense=dense)
    assert {s(t) for t in range(begin + length)} <= {0.0, target}
    assert {s(t) for t in range(begin + length, begin + length + 40)} == {target}


@given(SPARSITIES, st.integers(4, 10**6))
def test_auto_ends_within_the_run(target: float, steps: int) -> None:
    s = schedules.auto(target, steps)
    assert s(steps - 1) == target
