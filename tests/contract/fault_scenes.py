"""What is disturbed: every way in which secateur writes a model or a plan, on a few hundred weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import secateur
from secateur.files import Files
from secateur.runtime.files import save_packed, unpack_file
from secateur.stores import disk
from tests.contract.disk import save_one, save_shards
from tests.contract.killed import digest, in_child

Work = Callable[[bool], object]
"""Does it; told whether it goes on with what was left."""


@dataclass(frozen=True)
class Scene:
    """Something that writes.

    Attributes:
        name: for the tally.
        work: what is done.
        out: where the result goes.
        source: what must stay as it is; the result itself where it is made in place.
        state: of a result, one string; empty if nothing is there.
        exchange: whether the filesystem can swap two folders.
    """

    name: str
    work: Work
    out: Path
    source: Path
    state: Callable[[Path], str] = digest
    exchange: bool = True

    @property
    def in_place(self) -> bool:
        """Whether the source itself is replaced."""
        return self.out == self.source


def weights() -> dict[str, torch.Tensor]:
    """Three layers of 128 weights."""
    return {f"{n}.weight": torch.arange(1.0, 129).roll(7 * i).view(8, 16) for i, n in enumerate("abc")}


def scenes(root: Path) -> Iterator[Scene]:
    """Each in a folder of its own, with what was there before."""
    for name, make in MAKERS.items():
        folder = root / name.replace(" ", "-")
        folder.mkdir(parents=True)
        yield make(name, folder)


def _sources(folder: Path, shards: bool) -> tuple[Path, Path]:
    if shards:
        return save_shards(weights(), folder / "in"), folder / "out"
    return save_one(weights(), folder).rename(folder / "in.safetensors"), folder / "out.safetensors"


def _pruned(name: str, folder: Path, shards: bool, over: bool, exchange: bool = True) -> Scene:
    source, out = _sources(folder, shards)
    if over:
        secateur.prune(source, 0.25, out=out)
        if shards:  # as if it were the result of another source
            (out / "config.json").write_text('{"model_type": "old"}')
            (out / "old.txt").write_text("old")

    def work(again: bool) -> object:
        return secateur.prune(source, 0.75, out=out, overwrite=over, files=Files(resume=again))

    return Scene(name, work, out, source, exchange=exchange)


def _in_place(name: str, folder: Path, shards: bool) -> Scene:
    source, _ = _sources(folder, shards)

    def work(again: bool) -> object:
        return secateur.prune(source, 0.75, out=source, files=Files(in_place=True, resume=again))

    return Scene(name, work, source, source)


def _applied(name: str, folder: Path, over: bool) -> Scene:
    source, out = _sources(folder, shards=True)
    plan = secateur.plan(source, 0.5, pattern="2:4")
    if over:
        secateur.prune(source, 0.25, out=out)

    def work(again: bool) -> object:
        return secateur.apply(plan, source, out=out, overwrite=over, files=Files(resume=again))

    return Scene(name, work, out, source)


class _Stop(Exception):
    pass


def _resumed(name: str, folder: Path) -> Scene:
    """Begun by a process that ended after one file; the going on is disturbed."""
    source, out = _sources(folder, shards=True)
    secateur.prune(source, 0.25, out=out)

    def stop(done: int, total: int, file: str) -> None:
        if done:
            raise _Stop

    def begin() -> None:
        try:
            secateur.prune(source, 0.75, out=out, overwrite=True, files=Files(progress=stop))
        except _Stop:
            return
        raise AssertionError("it was not stopped")

    assert in_child(begin) == 0
    assert len(list(folder.glob(".out.partial-*"))) == 1

    def work(again: bool) -> object:
        return secateur.prune(source, 0.75, out=out, overwrite=True, files=Files(resume=True))

    return Scene(name, work, out, source)


def _packed(name: str, folder: Path, shards: bool, over: bool) -> Scene:
    source, out = _sources(folder, shards)
    if over:
        save_packed(source, out, codec="zstd")
    dense, source = source, folder / ("sparse" if shards else "sparse.safetensors")
    secateur.prune(dense, 0.75, out=source)
    return Scene(name, lambda again: save_packed(source, out, overwrite=over), out, source)


def _unpacked(name: str, folder: Path) -> Scene:
    dense, out = _sources(folder, shards=True)
    secateur.prune(dense, 0.75, out=folder / "sparse")
    save_packed(folder / "sparse", folder / "packed")
    secateur.prune(dense, 0.25, out=out)
    return Scene(name, lambda again: unpack_file(folder / "packed", out, overwrite=True), out, folder / "packed")


def _plan(name: str, folder: Path) -> Scene:
    source, out = _sources(folder, shards=False)
    old, new = (secateur.plan(source, s, criterion=lambda weight: -weight) for s in (0.25, 0.75))
    secateur.save_plan(old, out.with_suffix(".json"))

    def state(path: Path) -> str:
        plan = secateur.load_plan(path)
        assert plan.masks
        return plan.digest()

    return Scene(
        name, lambda again: secateur.save_plan(new, out.with_suffix(".json"), overwrite=True), out.with_suffix(".json"),
        source, state,
    )  # fmt: skip


MAKERS: dict[str, Callable[[str, Path], Scene]] = {
    "prune a folder": lambda n, f: _pruned(n, f, shards=True, over=False),
    "prune a folder over another": lambda n, f: _pruned(n, f, shards=True, over=True),
    "the same without exchange": lambda n, f: _pruned(n, f, shards=True, over=True, exchange=False),
    "prune a folder in place": lambda n, f: _in_place(n, f, shards=True),
    "go on with a folder": _resumed,
    "apply a plan": lambda n, f: _applied(n, f, over=False),
    "apply a plan over another": lambda n, f: _applied(n, f, over=True),
    "prune a file": lambda n, f: _pruned(n, f, shards=False, over=False),
    "prune a file over another": lambda n, f: _pruned(n, f, shards=False, over=True),
    "prune a file in place": lambda n, f: _in_place(n, f, shards=False),
    "pack a folder": lambda n, f: _packed(n, f, shards=True, over=True),
    "pack a file": lambda n, f: _packed(n, f, shards=False, over=False),
    "unpack a folder": _unpacked,
    "save a plan with masks": _plan,
}


@contextmanager
def kept(folder: Path) -> Iterator[Callable[[], None]]:
    """Yields what puts a folder back as it is now, names, bytes and times; a copy lies beside it meanwhile."""
    aside = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, aside)

    def restore() -> None:
        for child in folder.iterdir():
            if not _same(child, aside / child.name):
                disk.remove(child)
        for child in aside.iterdir():
            if not (folder / child.name).exists():
                (shutil.copytree if child.is_dir() else shutil.copy2)(child, folder / child.name)

    try:
        yield restore
    finally:
        shutil.rmtree(aside)


def _same(a: Path, b: Path) -> bool:
    if not b.exists():
        return False
    times = [a.stat().st_mtime_ns == b.stat().st_mtime_ns, *(
        (b / p.relative_to(a)).exists() and p.stat().st_mtime_ns == (b / p.relative_to(a)).stat().st_mtime_ns
        for p in a.rglob("*") if p.is_file()
    )]  # fmt: skip
    return all(times) and digest_of(a) == digest_of(b)


def digest_of(path: Path) -> list[tuple[str, bytes]]:
    """Names below a path, and bytes."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(p.relative_to(path)), p.read_bytes()) for p in files]
