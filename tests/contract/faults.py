"""Makes every file operation of the writing path fail, as SQLite tests itself, and looks at what is left.

For n = 1, 2, … until a run passes untouched: the n-th operation fails with an error, once or from then on, or the process ends
there by SIGKILL. After each: the old result or the new one is there, whole; going on gives the bytes of an undisturbed run; and
cleaning leaves nothing but results. As a program it runs all of it, and writes the tally into docs/reliability.md.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import OutputExists, SecateurError
from secateur.stores import disk, staging
from tests.contract.fault_scenes import MAKERS, Scene, kept
from tests.contract.killed import digest
from tests.guard.source import ROOT

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EINTR": errno.EINTR}
KILL = "SIGKILL"
FAULTS = [f"{name} {how}" for name in ERRORS for how in ("once", "from then on")] + [KILL]
PASSED, FAILED, UNTOUCHED = range(3)
CLEANING = ("unlink", "rmdir", "list")
MOST = 2000


@dataclass
class Tally:
    """What happened in a scene."""

    operations: int = 0
    endings: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        self.endings[what] = self.endings.get(what, 0) + 1


class Disturb:
    """For ``disk.before``: the n-th operation of this process fails, or ends it, after it told a pipe which one that was."""

    def __init__(self, fault: str, n: int) -> None:
        self.fault, self.n, self.seen, self.what, self.pipe = fault, n, 0, "", -1
        self.lock = threading.Lock()

    def __call__(self, what: str, path: str) -> None:
        with self.lock:
            self.seen += 1
            now, later = self.seen == self.n, self.seen > self.n
        if now:
            self.what = what
            if self.fault == KILL:
                os.write(self.pipe, what.encode())
                os.kill(os.getpid(), signal.SIGKILL)
        if now or (later and self.fault.endswith("from then on")):
            code = ERRORS[self.fault.split()[0]]
            raise OSError(code, os.strerror(code), path)


@contextmanager
def rigged(hook: Disturb | None, exchange: bool, most: int = 700) -> Iterator[None]:
    """Operations are disturbed. Writes write less than they are given, so that a kill leaves half a file; nothing is forced
    to disk, which kills do not need; every process that left something is taken for gone."""
    write = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, memoryview(data)[:most]))
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(staging, "_is_gone", lambda pid: True)
        patch.setattr(sys, "unraisablehook", lambda e: None)  # a file that is let go of in a generator cannot raise
        patch.setattr(disk, "before", hook)
        if not exchange:
            patch.setattr(disk, "_exchanged", lambda a, b: False)
        yield


def here(work: Callable[[], object], hook: Disturb | None, exchange: bool) -> tuple[int, str]:
    """How something ended that is done in this process, and at which operation it was disturbed."""
    with rigged(hook, exchange):
        code = _done(work)
    return (UNTOUCHED if hook and hook.seen < hook.n and code == PASSED else code), hook.what if hook else ""


def killed(work: Callable[[], object], hook: Disturb, exchange: bool) -> tuple[int, str]:
    """The same in a child, which does not come back."""
    ours, hook.pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            code, _ = here(work, hook, exchange)
        finally:
            os._exit(code)
    os.close(hook.pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    what = os.read(ours, 100).decode()
    os.close(ours)
    return code, what


def _done(work: Callable[[], object]) -> int:
    try:
        work()
    except (SecateurError, OSError) as e:
        return FAILED if not isinstance(e, OutputExists) else PASSED
    return PASSED


def disturbed(scene: Scene, faults: Callable[[int], Sequence[str]]) -> Tally:
    """Runs a scene with each of the faults of n at its n-th operation, for every n; see the module."""
    tally = Tally()
    folder = scene.out.parent
    with kept(folder) as restore:
        old, source = scene.state(scene.out) if scene.out.exists() else "", digest(scene.source)
        assert here(lambda: scene.work(False), None, scene.exchange) == (PASSED, "")
        new, names = scene.state(scene.out), sorted(p.name for p in folder.iterdir() if p.name[0] != ".")
        assert new not in ("", old)
        for n in range(1, MOST):
            for fault in faults(n):
                restore()
                run = killed if fault == KILL else here
                code, what = run(lambda: scene.work(False), Disturb(fault, n), scene.exchange)
                if code == UNTOUCHED:
                    return tally
                found = _looked_at(scene, tally, fault, code, what, (old, new, source), names)
                tally.wrong += [f"{scene.name}, {fault} at operation {n} ({what}): {why}" for why in found]
            tally.operations = n
    raise AssertionError("no end")


def _looked_at(
    scene: Scene, tally: Tally, fault: str, code: int, what: str, states: tuple[str, str, str], names: list[str]
) -> Iterator[str]:
    """What is wrong after a disturbed run, after going on, and after cleaning."""
    old, new, source = states
    folder = scene.out.parent
    if code != -signal.SIGKILL if fault == KILL else code not in (PASSED, FAILED):
        yield f"it ended with {code}"
    if fault == "EINTR once" and code != PASSED:
        yield "it did not succeed"
    if not scene.exchange:  # the old one lies aside for a moment: cleaning puts it back, if the new one did not come
        cleaned(p for p in folder.iterdir() if ".old-" in p.name)
    state = _state(scene)
    if state not in (old, new) or (code == PASSED and state != new):
        yield (
            "neither the old result nor the new one is there"
            if state not in (old, new)
            else "the new result is not there"
        )
    if not scene.in_place and digest(scene.source) != source:
        yield "the source was touched"
    left = sorted(p for p in folder.iterdir() if p.name[0] == ".")
    journaled = any(j.read_text() for p in left for j in p.glob("journal.*"))
    if left and fault.endswith("once") and what not in CLEANING and not journaled:
        yield f"{left[0].name} is left"
    tally.count(
        f"{'killed' if code < 0 else 'done' if code == PASSED else 'failed'}, {'new' if state == new else 'old'}"
    )
    if left:
        tally.count("gone on with")
        again, _ = here(lambda: scene.work(True), None, scene.exchange)
        if again != PASSED or _state(scene) != new:
            yield f"going on ended with {again}, and {'the new' if _state(scene) == new else 'no new'} result"
    cleaned(folder.iterdir())
    strays = sorted({p.name for p in folder.iterdir()} - set(names) - _allowed(scene))
    if strays:
        yield f"cleaning left {strays}"


def cleaned(paths: Iterable[Path]) -> None:
    """What ``secateur clean`` does, once the processes are gone."""
    with rigged(None, exchange=True):
        staging.remove_stale(paths)


def _state(scene: Scene) -> str:
    try:
        return scene.state(scene.out) if scene.out.exists() else ""
    except Exception as e:
        return repr(e)


def _allowed(scene: Scene) -> set[str]:
    """Masks of a plan lie beside it under the name of their contents, until the next plan is saved there."""
    return {p.name for p in scene.out.parent.glob(f"{scene.out.name}.*.masks.safetensors")}


def table(tallies: dict[str, Tally], seconds: float) -> str:
    """The tally as a page shows it."""
    heads = [
        "operations",
        "runs",
        "done, new",
        "failed, old",
        "failed, new",
        "killed, old",
        "killed, new",
        "gone on with",
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, t in tallies.items():
        runs = sum(c for w, c in t.endings.items() if w != "gone on with")
        cells: list[Any] = [t.operations, runs, *(t.endings.get(h, 0) for h in heads[2:])]
        lines.append(f"| {name} | " + " | ".join(f"{c:,}" for c in cells) + " |")
    runs = sum(c for t in tallies.values() for w, c in t.endings.items() if w != "gone on with")
    wrong = sum(len(t.wrong) for t in tallies.values())
    total = sum(t.operations for t in tallies.values())
    lines += [
        "",
        f"{total:,} operations, {len(FAULTS)} faults at each, {runs:,} runs in {seconds:.0f} s; {wrong} lost anything.",
    ]
    return "\n".join(lines)


PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- faults: begin -->", "<!-- faults: end -->"


def main() -> None:
    """Runs everything, prints what was lost, and writes the tally into the page."""
    torch.set_num_threads(1)
    tallies, start = {}, time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        for name, make in MAKERS.items():
            if len(sys.argv) > 1 and sys.argv[1] not in name:
                continue
            folder = Path(root) / name.replace(" ", "-")
            folder.mkdir()
            tallies[name] = disturbed(make(name, folder), lambda n: FAULTS)
            for why in tallies[name].wrong:
                print(why)
    text = table(tallies, time.monotonic() - start)
    print(text)
    if len(sys.argv) == 1:
        page = PAGE.read_text("utf-8")
        whole = re.compile(f"({re.escape(MARKS[0])}\n).*(\n{re.escape(MARKS[1])})", re.S)
        PAGE.write_text(whole.sub(lambda m: m[1] + text + m[2], page), "utf-8")
    raise SystemExit(any(t.wrong for t in tallies.values()))


if __name__ == "__main__":
    main()
