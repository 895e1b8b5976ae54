"""Promise 10: whatever fails, and whenever, the old result or the new one is there, whole; and a run can be gone on with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import secateur
from secateur.cli.checkpoints import clean_command
from secateur.files import Files
from secateur.stores import disk
from tests.contract.fault_scenes import MAKERS, Scene
from tests.contract.faults import FAULTS, MARKS, PAGE, Disturb, disturbed, killed
from tests.contract.killed import digest


@pytest.mark.parametrize("name", [n for n in MAKERS if not n.startswith("apply")])
def test_every_operation_fails_in_one_way(name: str, tmp_path: Path) -> None:
    """The ways in turn, so that each operation's neighbours fail in others."""
    tally = disturbed(scene(name, tmp_path), lambda n: [FAULTS[n % len(FAULTS)]])
    assert not tally.wrong
    assert tally.operations > 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MAKERS)
def test_every_operation_fails_in_every_way(name: str, tmp_path: Path) -> None:
    tally = disturbed(scene(name, tmp_path), lambda n: FAULTS)
    assert not tally.wrong
    assert sum(c for what, c in tally.endings.items() if what != "gone on with") == tally.operations * len(FAULTS)


def scene(name: str, folder: Path) -> Scene:
    (folder / "scene").mkdir()
    return MAKERS[name](name, folder / "scene")


def careless(out: Path) -> Callable[[bool], object]:
    """Writes the result where it belongs, without a stage."""

    def work(again: bool) -> None:
        with disk.opened(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            disk.write_all(fd, out, memoryview(b"new" * 1000))

    return work


def test_a_careless_writer_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    out, source = folder / "out", folder / "in"
    out.write_bytes(b"old" * 1000)
    source.write_bytes(b"source")
    tally = disturbed(Scene("careless", careless(out), out, source), lambda n: FAULTS)
    assert any("neither the old result nor the new one" in why for why in tally.wrong)
    assert any("SIGKILL" in why for why in tally.wrong)


def test_what_is_renamed_was_forced_to_disk(tmp_path: Path) -> None:
    """What a kill does not show, and a power cut would: every new file and folder is synced before it is put in its place."""
    for name in (
        "prune a folder over another",
        "pack a folder",
        "unpack a folder",
        "prune a file",
        "save a plan with masks",
    ):
        made = (
            scene(name, tmp_path / name.replace(" ", "-"))
            if (tmp_path / name.replace(" ", "-")).mkdir() is None
            else None
        )
        assert made is not None
        seen: list[tuple[str, str]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "before", lambda what, path, seen=seen: seen.append((what, path)))
            made.work(False)
        placed = max(
            i for i, (what, path) in enumerate(seen) if what in ("rename", "exchange", "link") and path == str(made.out)
        )
        written = {path for what, path in seen[:placed] if what in ("write", "copy")}
        for path in written:
            last = max(i for i, (what, p) in enumerate(seen[:placed]) if p == path and what in ("write", "copy"))
            assert ("fsync", path) in seen[last:placed], (name, path)
        assert ("fsync", str(made.out.parent)) in seen[placed:]


def test_clean_and_going_on_by_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A killed run is gone on with, or cleaned away; what a run is at work on, or goes on with, stays."""
    made = scene("prune a folder", tmp_path)
    folder = made.out.parent
    _, what = killed(lambda: made.work(False), Disturb("SIGKILL", 150), exchange=True)
    assert what
    (left,) = folder.glob(".out.partial-*")
    stays: list[bool] = []

    def look(done: int, total: int, file: str) -> None:
        clean_command(folder)
        stays.append(len(list(folder.glob(".out.partial-*"))) == 1)
        with pytest.raises(secateur.BadInput, match=r"another run is making .*out just now"):
            secateur.prune(made.source, 0.75, out=made.out, files=Files(resume=True))

    secateur.prune(made.source, 0.75, out=made.out, files=Files(resume=True, progress=look))
    assert stays
    assert all(stays)
    assert not left.exists()
    killed(lambda: made.work(False), Disturb("SIGKILL", 150), exchange=True)
    capsys.readouterr()
    other = secateur.prune(made.source, 0.5, out=folder / "other")
    assert other.zeros == 192
    clean_command(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["in", "other", "out"]


def test_a_request_that_is_another_does_not_go_on(tmp_path: Path) -> None:
    made = scene("prune a folder", tmp_path)
    killed(lambda: made.work(False), Disturb("SIGKILL", 150), exchange=True)
    with pytest.raises(secateur.BadInput, match="another request, or the source has changed"):
        secateur.prune(made.source, 0.5, out=made.out, files=Files(resume=True))
    shard = next(made.source.glob("*.safetensors"))
    os.utime(shard, ns=(1, time.time_ns()))
    with pytest.raises(secateur.BadInput, match="another request, or the source has changed"):
        made.work(True)
    assert not made.out.exists()
    made.work(False)
    assert [p.name for p in made.out.parent.iterdir() if p.name[0] == "."] == []
    assert digest(made.out)


def test_a_run_killed_when_its_result_was_in_place_is_gone_on_with(tmp_path: Path) -> None:
    """All that is left to do is to tidy up; in place, too, where the source is another by then."""
    for name in ("prune a folder", "prune a folder over another", "prune a folder in place"):
        (tmp_path / name).mkdir()
        made, seen = scene(name, tmp_path / name), list[tuple[str, str]]()
        _, after = killed(lambda made=made: made.work(False), Disturb("SIGKILL", 10**6), exchange=True)
        assert after == ""
        new = digest(made.out)
        (tmp_path / name / "again").mkdir()
        made = scene(name, tmp_path / name / "again")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "before", lambda what, path, seen=seen: seen.append((what, path)))
            made.work(False)
        n = max(i for i, (what, path) in enumerate(seen) if what in ("rename", "exchange") and path == str(made.out))
        for later in range(n, n + 300):  # writes in parts are more operations than were counted
            (tmp_path / name / f"{later}").mkdir()
            made = scene(name, tmp_path / name / f"{later}")
            assert killed(lambda made=made: made.work(False), Disturb("SIGKILL", later), exchange=True)[1]
            if digest(made.out) == new:
                break
        assert list(made.out.parent.glob(f".{made.out.name}.*"))
        assert digest(made.out) == new
        report = made.work(True)
        assert isinstance(report, secateur.Report)
        assert report.zeros == 288
        assert digest(made.out) == new
        assert not list(made.out.parent.glob(f".{made.out.name}.*"))


def test_the_page_has_the_tally_of_these_scenes() -> None:
    text = PAGE.read_text("utf-8")
    tally = text[text.index(MARKS[0]) : text.index(MARKS[1])]
    assert [line.split("|")[1].strip() for line in tally.splitlines() if line.startswith("| ")][1:] == list(MAKERS)
    assert "; 0 lost anything." in tally
