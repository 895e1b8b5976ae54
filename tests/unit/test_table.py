"""The dispatch table: what is read from it is never more than was measured, and what is not known stays dense."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import BadInput
from secateur.runtime import table as tables
from secateur.runtime.grid import Route
from secateur.runtime.layers import PackedLinear
from secateur.runtime.modules import pack
from secateur.runtime.table import LEAST, Table, choose, decide, key, packaged, route
from tests.unit.tables_of import (
    BOTH,
    COLUMNS,
    DENSITIES,
    OUT,
    ROWS,
    Ratio,
    constant,
    expand,
    grid_of,
    kernel,
    table_of,
)

F32 = torch.float32


def noisy(draw: random.Random) -> Ratio:
    about = draw.uniform(0.9, 1.2)
    return lambda *point: about * draw.uniform(0.9, 2.0)


# ------------------------------------------------------------------------------------------ reading between what was measured


def test_what_was_measured_is_read() -> None:
    grid = grid_of(BOTH)
    for out, columns, density, rows in product(OUT, COLUMNS, DENSITIES, ROWS):
        for name, ratio in (("kernel", kernel), ("expand", expand)):
            found = grid.ratio("bitmask", name, out, columns, density, rows)  # type: ignore[arg-type]
            assert found == ratio(out, columns, density, rows)


def test_between_it_is_the_least_of_the_neighbours() -> None:
    draw = random.Random(0)
    values = {point: draw.uniform(0.1, 9) for point in product(OUT, COLUMNS, DENSITIES, ROWS)}
    grid = grid_of((lambda *p: values[p], constant(0.1)))
    near = [values[p] for p in product(OUT, COLUMNS, (0.1, 0.5), (16, 128))]
    assert grid.ratio("bitmask", "kernel", 500, 1000, 0.2, 100) == min(near)
    near = [values[p] for p in product((128,), COLUMNS, (0.1,), (16,))]
    assert grid.ratio("bitmask", "kernel", 128, 1000, 0.1, 16) == min(near)


def test_nothing_is_gained_outside() -> None:
    grid = grid_of((constant(9.0), constant(9.0)))
    asked: list[tuple[Route, int, int, float, int]] = [
        ("kernel", 127, 4096, 0.1, 1), ("kernel", 128, 127, 0.1, 1), ("kernel", 128, 128, 0.51, 1),
        ("expand", 127, 128, 0.1, 9999), ("expand", 1024, 4096, 1.0, 1),
    ]  # fmt: skip
    assert [grid.ratio("bitmask", *a) for a in asked] == [0.0] * len(asked)


def test_larger_and_sparser_is_the_last_that_was_measured() -> None:
    grid = grid_of(BOTH)
    assert grid.ratio("bitmask", "kernel", 9999, 99999, 0.001, 1) == kernel(1024, 4096, 0.05, 1)
    assert grid.ratio("bitmask", "expand", 128, 128, 0.1, 100_000) == expand(128, 128, 0.1, 512)
    assert grid.ratio("bitmask", "kernel", 128, 128, 0.1, 100_000) == kernel(128, 128, 0.1, 512)


# ------------------------------------------------------------------------------------------ choosing


def test_the_layout_that_gains_most() -> None:
    better = (lambda *p: 2 * kernel(*p), expand)
    assert choose(1024, 4096, 0.1, F32, table_of(BOTH)) == "bitmask"
    assert choose(1024, 4096, 0.1, F32, table_of(BOTH, better)) == "csr"
    assert choose(1024, 4096, 0.1, F32, table_of(better, BOTH)) == "bitmask"
    assert "3.00 at 1 row" in decide(1024, 4096, 0.1, F32, table_of(BOTH)).why


def test_a_layout_that_is_slow_at_some_rows_is_not_used() -> None:
    """However fast it is at others; the other one is, though it gains less."""
    slow = (lambda o, c, d, rows: 50.0 if rows == 1 else 0.5, constant(0.5))
    assert "0.50 times as fast as dense at 8 rows" in decide(1024, 4096, 0.1, F32, table_of(slow)).why
    assert choose(1024, 4096, 0.1, F32, table_of(slow, BOTH)) == "csr"


def test_a_gap_between_the_routes_counts() -> None:
    """At every step one route is fine, but between two steps neither is known to be."""
    few = (lambda o, c, d, rows: 2.0 if rows <= 16 else 0.5, lambda o, c, d, rows: 1.0 if rows > 16 else 0.5)
    assert choose(1024, 4096, 0.1, F32, table_of(few)) is None
    assert "0.50 times as fast as dense at 72 rows" in decide(1024, 4096, 0.1, F32, table_of(few)).why


@pytest.mark.parametrize("asked", [(1024, 4096, 0.1), (300, 5000, 0.2), (1024, 4096, 0.5), (128, 128, 0.001)])
def test_what_is_chosen_is_nowhere_slow(asked: tuple[int, int, float]) -> None:
    """Over tables of many shapes: the route for any number of rows keeps the promise, or the matrix stays dense."""
    draw, chosen = random.Random(1), 0
    for _ in range(100):
        drawn = [noisy(draw) for _ in range(4)]
        table = table_of((drawn[0], drawn[1]), (drawn[2], drawn[3]))
        layout = choose(*asked, F32, table)
        if layout is None:
            continue
        chosen += 1
        for rows in (1, 2, 15, 16, 17, 64, 127, 128, 129, 300, 512, 513, 5000):
            way = route(layout, rows, asked[2], *asked[:2], F32, table)
            assert table.grids[0].ratio(layout, way, *asked, rows) >= LEAST
    assert chosen


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ((64, 4096, 0.1, F32), "64 x 4096 is smaller than what was measured, 128 x 128"),
        ((1024, 4096, 0.6, F32), "60.0% of it is not zero; gains were looked for up to 50%"),
        ((1024, 4096, 0.1, torch.bfloat16), "nothing was measured for bfloat16"),
    ],
)
def test_why_a_matrix_stays_dense(asked: tuple[int, int, float, torch.dtype], why: str) -> None:
    choice = decide(*asked, table_of(BOTH))
    assert choice.layout is None
    assert why in choice.why


def test_what_gains_nothing_stays_dense() -> None:
    choice = decide(1024, 4096, 0.1, F32, table_of((constant(1.0), constant(1.0))))
    assert (choice.layout, choice.why[:17]) == (None, "nothing is gained")


def test_csr_has_no_more_columns_than_it_can_number() -> None:
    table = table_of((constant(1.0), constant(1.0)), (constant(3.0), constant(1.0)))
    assert [choose(1024, n, 0.1, F32, table) for n in (65536, 65537)] == ["csr", None]


def test_a_table_of_another_processor_says_nothing() -> None:
    facts = json.loads(table_of(BOTH).to_json())
    facts["grids"][0]["key"] = "z80"
    choice = decide(1024, 4096, 0.1, F32, Table.from_json(json.dumps(facts)))
    assert choice.layout is None
    assert f"{key(F32)}; `secateur tune` does" in choice.why


def test_a_table_of_another_maker_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are the same, but not how fast torch's own product is."""
    facts = json.loads(table_of(BOTH).to_json())
    facts["grids"][0]["machine"] = "AMD EPYC, 2 cores"
    table = Table.from_json(json.dumps(facts))
    for name, layout in (("AMD Ryzen", "bitmask"), ("Intel(R) Xeon(R)", None), ("a processor", None)):
        monkeypatch.setattr(tables, "processor", lambda name=name: name)
        choice = decide(1024, 4096, 0.1, F32, table)
        assert choice.layout == layout
    assert "nothing was measured for float32 on" in choice.why


def test_routes() -> None:
    table = table_of(BOTH)
    assert [route("bitmask", n, 0.1, 1024, 4096, F32, table) for n in (0, 1, 16, 128, 512, 9999)] == [
        "kernel", "kernel", "kernel", "expand", "expand", "expand",
    ]  # fmt: skip


def test_routes_of_what_no_table_knows() -> None:
    """A layout that was forced: few rows by the kernel, many expanded."""
    for table in (Table(()), table_of(BOTH)):
        assert [route("csr", n, 0.9, 8, 8, F32, table) for n in (1, 255, 256)] == ["kernel", "kernel", "expand"]


def test_the_same_choice_every_time() -> None:
    table, again = table_of(BOTH, BOTH), Table.from_json(table_of(BOTH, BOTH).to_json())
    for shape in product((128, 777, 5000), (128, 640, 4096), (0.01, 0.1, 0.3)):
        assert decide(*shape, F32, table) == decide(*shape, F32, again)


# ------------------------------------------------------------------------------------------ in and out


def test_json_there_and_back() -> None:
    table = Table((grid_of(BOTH, BOTH), grid_of(BOTH, dtype="bfloat16")))
    again = Table.from_json(table.to_json())
    assert again.to_json() == table.to_json()
    assert [g.ratios for g in again.grids] == [g.ratios for g in table.grids]
    assert again.grid(torch.bfloat16) is again.grids[1]
    assert again.grid(torch.float16) is None


def test_the_packaged_tables_are_tables() -> None:
    """Also for processors other than this one; no key occurs twice for a dtype."""
    grids = packaged().grids
    assert len({(g.dtype, g.key) for g in grids}) == len(grids)


def test_a_file_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_of(BOTH).to_json(), encoding="utf-8")
    monkeypatch.setenv("SECATEUR_TABLE", str(path))
    tables._found.cache_clear()
    assert choose(1024, 4096, 0.1, F32) == "bitmask"
    assert route("bitmask", 128, 0.1, 1024, 4096, F32) == "expand"
    monkeypatch.setenv("SECATEUR_TABLE", str(tmp_path / "none.json"))
    assert choose(1024, 4096, 0.1, F32) == "bitmask"  # it is read once
    tables._found.cache_clear()
    with pytest.raises(BadInput, match=r"none\.json cannot be read"):
        choose(1024, 4096, 0.1, F32)
    monkeypatch.undo()
    tables._found.cache_clear()


def test_the_path_of_a_table(tmp_path: Path) -> None:
    """Wherever a table goes; read again where the file has changed."""
    path = tmp_path / "table.json"
    path.write_text(table_of(BOTH).to_json(), encoding="utf-8")
    layer = torch.nn.Linear(4096, 1024)
    layer.weight.data[:, 400:] = 0
    assert isinstance(pack(layer, table=path), PackedLinear)
    assert choose(1024, 4096, 0.1, F32, str(path)) == "bitmask"
    path.write_text(Table(()).to_json(), encoding="utf-8")
    os.utime(path, ns=(1, 1))
    assert choose(1024, 4096, 0.1, F32, path) is None
    with pytest.raises(BadInput, match=r"none\.json cannot be read"):
        pack(torch.nn.Linear(4096, 1024), table=tmp_path / "none.json")


def test_a_table_for_a_while() -> None:
    before = tables.active()
    with tables.using(table_of(BOTH)) as _, tables.using(table_of((constant(3.0), constant(1.0)))):
        assert route("bitmask", 512, 0.1, 1024, 4096, F32) == "kernel"
    assert tables.active() is before


def test_the_kind_of_processor() -> None:
    """Kernels first; for 16 bits also what torch's dense product has."""
    assert key(torch.bfloat16).startswith(key(F32))
    assert "+" not in key(F32)


Change = Callable[[dict[str, Any], dict[str, Any]], object]
SLIPS: dict[str, Change] = {
    "`version` and `grids`": lambda t, g: t.pop("version"),
    "its version is 1; got 2": lambda t, g: t.update(version=2),
    "its version is 1; got True": lambda t, g: t.update(version=True),
    "`grids` is a short list": lambda t, g: t.update(grids=[g] * 65),
    "a grid has dtype, key": lambda t, g: g.update(more=1),
    "short texts": lambda t, g: g.update(machine="x" * 501),
    "dtype is one of": lambda t, g: g.update(dtype="int8"),
    "`out` holds ascending numbers above 0": lambda t, g: g.update(out=[1024, 128]),
    "`columns` holds ascending": lambda t, g: g.update(columns=[128, 128.5]),
    "`rows` holds ascending": lambda t, g: g.update(rows=[0, 16, 128, 512]),
    "rows begin with 1; got 2": lambda t, g: g.update(rows=[2, 16, 128, 512]),
    "`densities` holds ascending": lambda t, g: g.update(densities=[0.1, float("nan"), 0.5]),
    "a density is at most 1": lambda t, g: g.update(densities=[0.1, 0.2, 1.5]),
    "ratios are of bitmask, csr": lambda t, g: g["ratios"].update(dense={}),
    "bitmask has kernel and expand": lambda t, g: g["ratios"]["bitmask"].pop("expand"),
    "bitmask, kernel has a number for each of 48 points": lambda t, g: g["ratios"]["bitmask"]["kernel"].pop(),
    "ratios lie between 0 and 10000; bitmask, kernel": lambda t, g: g["ratios"]["bitmask"]["kernel"].__setitem__(0, -1),
    "ratios lie between 0 and 10000; bitmask, expand": lambda t, g: g["ratios"]["bitmask"]["expand"].__setitem__(
        0, "2"
    ),
    "ratios lie between 0 and 10000": lambda t, g: g["ratios"]["bitmask"]["kernel"].__setitem__(3, float("inf")),
}


@pytest.mark.parametrize("said", SLIPS)
def test_what_is_no_table_is_refused(said: str) -> None:
    facts = json.loads(table_of(BOTH).to_json())
    SLIPS[said](facts, facts["grids"][0])
    with pytest.raises(BadInput, match=r"this is not a table of secateur: .*" + said):
        Table.from_json(json.dumps(facts))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "1", "null", '{"version": 1, "grids": {}}', "\0"])
def test_what_is_not_even_json(text: str) -> None:
    with pytest.raises(BadInput, match="table"):
        Table.from_json(text)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b" " * (tables.MOST_BYTES + 1))
    with pytest.raises(BadInput, match="a table has at most"):
        Table.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"table\.json cannot be read"):
        Table.read(path)


def test_rows_that_do_not_matter_forbid_nothing() -> None:
    """A layout that is slower from 128 rows on is used where at most 16 matter."""
    t = table_of((kernel, constant(0.1)))
    asked = 1024, 4096, 0.1, F32
    assert choose(*asked, t) is None and choose(*asked, t.up_to(128)) is None
    assert choose(*asked, t.up_to(16)) == "bitmask"
    assert choose(*asked, t.up_to(16).up_to(None)) is None
    layer = torch.nn.Linear(4096, 1024, bias=False)
    layer.weight.data[:, 400:] = 0
    assert isinstance(pack(layer, rows=1, table=t), PackedLinear)
    for rows in (0, True, 1.5):
        with pytest.raises(BadInput, match="the most rows of activations"):
            pack(layer, rows=rows)  # type: ignore[arg-type]
