"""The benchmark of checkpoints on disk, in small, and the simulation beside real runs of two workers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import checkpoint, checkpoint_chart, simulate
from benchmarks.result import Result
from benchmarks.simulate import Model, Site
from benchmarks.timing import Timing
from secateur.carry_files import planned_there
from secateur.core import profile
from secateur.core.request import Request
from secateur.engines.sums import together
from secateur.stores import disk
from secateur.stores.checkpoint import MEMORY, CheckpointStore

ASKED: dict[str, dict[str, Any]] = {
    "global": {"sparsity": 0.5},
    "uniform": {"sparsity": 0.5, "allocation": "uniform"},
    "lamp": {"sparsity": 0.5, "allocation": "lamp"},
    "2:4": {"pattern": "2:4"},
}
TENSORS, SHAPE = 6, (96, 1024)
WIDTHS = {torch.bfloat16: 2, torch.float32: 4}


def a_cell(gb: float, serial: float) -> checkpoint.Cell:
    seconds = {"cat": 1.0, "cp, sync": 2.0, "plan": 1.0, "prune": 5.0, "cat, cp, sync by 2": 1.5, "prune --jobs 2": 4.0}
    times = {name: Timing((s, s)) for name, s in seconds.items()}
    return checkpoint.Cell(gb, 4, {"warm": times, "cold": times}, [serial], [serial])


def a_result() -> Result:
    cells = [a_cell(0.5, 40), a_cell(2, 50), a_cell(6, 60)]
    tables = checkpoint.tables_of(cells, "2 turns", Timing((2.0,)), 200 << 20)
    return Result("checkpoint", "python", "a machine", tables, checkpoint.bars_of(cells))


def test_bars_are_of_ratios_and_of_memory() -> None:
    found = {b.what: (round(b.found, 2), b.limit, b.reached) for b in a_result().bars}
    assert found["2 GB, warm: prune, of cat + cp + sync"] == (1.67, 2.0, True)
    assert found["2 GB, cold: prune, of cat + cp + sync"] == (1.67, 1.4, False)
    assert found["6 GB, warm: times faster with 2 processes (the disk: 2)"] == (1.25, 1.5, False)
    assert found["6 GB: memory beyond an idle process"] == (60, 300.0, True)
    assert found["memory of 6 GB, 2 GB = 1"] == (1.2, 1.1, False)
    assert not any("0.5 GB, " in what for what in found)


def test_the_picture_shows_every_size() -> None:
    found = checkpoint_chart.picture(a_result())
    assert found.count("<svg") == 3 and found.count("<title>") == 3 * 3 + 3
    assert "6 GB: 60 (60–60)" in found and len(found) < 20_000


def test_a_checkpoint_is_as_large_as_said(tmp_path: Path) -> None:
    assert checkpoint.make(tmp_path / "c", 0.01) == 4
    assert abs(CheckpointStore(tmp_path / "c").nbytes / 1e7 - 1) < 0.1


def test_small_checkpoints_are_measured_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MOST", {"cold": 1.4})
    cell = checkpoint.measured(0.004, tmp_path, 1, 1 << 20, 0.0)
    assert set(cell.times["cold"]) == set(checkpoint.NAMES)
    assert all(statistics.median(t.seconds) > 0 for t in cell.times["cold"].values())
    assert cell.serial[0] > 0 < cell.worker[0]
    assert not list(tmp_path.iterdir())


def test_what_fails_is_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="false"):
        checkpoint.shells([["false"], ["true"]])
    with pytest.raises(RuntimeError, match="secateur prune"):
        checkpoint.child.call(
            "benchmarks.checkpoint", "command", arguments=["prune", str(tmp_path / "none"), "-o", "x"]
        )


def write(folder: Path, dtype: torch.dtype) -> Path:
    """Two shards with tensors of one size."""
    folder.mkdir()
    made, table = torch.Generator().manual_seed(0), {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        tensors = {
            f"layers.{i}.proj_{j}.weight": (torch.randn(SHAPE, generator=made) * (0.5 + 0.1 * j + 0.05 * i)).to(dtype)
            for j in range(TENSORS // 2)
        }
        save_file(tensors, folder / file)
        table |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    return folder


def added(folder: Path, worker: int, workers: int, add: Callable[[Tensor], Tensor]) -> dict[str, list[list[int]]]:
    """In a worker: the shapes of all sums that each way asks for."""
    found: dict[str, list[list[int]]] = {}
    for way, asked in ASKED.items():
        seen: list[list[int]] = []

        def watched(counts: Tensor, seen: list[list[int]] = seen) -> Tensor:
            seen.append(list(counts.shape))
            return add(counts)

        planned_there(folder, None, MEMORY, (None, None), Request.of(**asked), None, None, worker, workers, watched)
        found[way] = seen
    return found


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_the_simulation_knows_every_sum_of_two_workers(dtype: torch.dtype, tmp_path: Path) -> None:
    """The number of sums, and their bytes. Of small fp32 tensors no cut goes through equal magnitudes."""
    real = together(partial(added, write(tmp_path / "c", dtype)), 2)
    model = Model(TENSORS, SHAPE[0] * SHAPE[1], WIDTHS[dtype], 2)
    for way, shapes in real.items():
        closer = [s for s in shapes if len(s) == 2 and s[1] > TENSORS] if way == "lamp" else []
        ties = simulate.ties_of(model, way)
        number, nbytes = simulate.sums(model, way, ties, len(closer))
        assert number == len(shapes), way
        assert nbytes == 8 * sum(torch.Size(s).numel() for s in shapes), way
        assert len(closer) <= 6 * TENSORS


@pytest.mark.parametrize(
    ("dtype", "kept"), [(t, k) for t in (torch.bfloat16, torch.float32) for k in (simulate.KEPT, 0)], ids=str
)
def test_the_simulation_knows_how_often_weights_are_read(
    dtype: torch.dtype, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and as several workers read. Counts that are not kept are made again."""
    assert simulate.KEPT == profile.KEPT
    read, real = [0], disk.read_at

    def counting(fd: int, path: Any, room: memoryview, offset: int) -> int:
        got = real(fd, path, room, offset)
        read[0] += got
        return got

    folder = write(tmp_path / "c", dtype)
    monkeypatch.setattr(disk, "read_at", counting)
    monkeypatch.setattr("secateur.core.make.Budget", lambda left: profile.Budget(kept))
    model = Model(TENSORS, SHAPE[0] * SHAPE[1], WIDTHS[dtype], 2)
    for way, asked in ASKED.items():
        for workers, add in ((1, None), (2, lambda counts: counts.clone())):
            read[0] = 0
            store = {"sum": add} if add is not None else {}
            request = Request.of(**asked)
            planned_by(CheckpointStore(folder, **store), request)  # type: ignore[arg-type]
            expected = simulate.passes(model, way, simulate.ties_of(model, way), workers, kept)
            assert abs(read[0] / model.nbytes - expected) < 0.01, (way, workers)


def planned_by(store: CheckpointStore, request: Request) -> None:
    from secateur.carry import make_plan

    with torch.no_grad():
        make_plan(store, request, None, None)


def test_the_arithmetic() -> None:
    """Ten GB in 5 files on 2 machines: the busier has 3 of them, 6 GB, counts them at 2 GB/s and rewrites them."""
    site = Site(read=4, count=2, rewrite=1, start=1, latency=0.01, network=1e9)
    model = Model(10, 500_000_000, 2, 5)
    found = simulate.cost(model, "2:4", 2, site)
    assert (found.files, found.read, found.written, found.sums) == (3, 12, 6, 2)
    assert found.plan == 6 / 4 + 6 / 2 and found.writing == 6 / 4 + 6 / 1
    assert abs(found.total - (1 + 4.5 + 0.02 + 7.5)) < 1e-6
    alone = simulate.cost(model, "2:4", 1, site)
    assert (alone.sums, alone.passes, alone.total) == (0, 1, 1 + 7.5 + 12.5)


def test_it_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    simulate.main(["--tb", "0.5", "--machines", "1", "2", "--files", "10"])
    shown = capsys.readouterr().out
    assert "0.5 TB bf16, 900 tensors, 10 files" in shown and "in all, on 2" in shown
