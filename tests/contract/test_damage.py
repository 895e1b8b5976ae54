"""Promise 11: damaged files are refused by name, or pruned for what they hold. Every byte, and every length, of small ones."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import secateur
from secateur.errors import SecateurError, SecateurWarning
from tests.contract.disk import load, save_one, save_shards
from tests.contract.nets import bits

INDEX = "model.safetensors.index.json"


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 8, generator=g), "b.weight": torch.randn(4, 8, generator=g).bfloat16(),
        "c.bias": torch.ones(3), "d.weight": torch.randn(4, 4, generator=g).half(),
    }  # fmt: skip


def outcome(source: Path, out: Path) -> str:
    """ "refused", or "right": what comes out is what pruning the tensors in memory gives. Anything else raises."""
    beside = {p.name for p in source.parent.iterdir()}
    names = [p.name for p in source.iterdir()] if source.is_dir() else [source.name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        try:
            secateur.prune(source, 0.5, out=out)
        except SecateurError as e:
            tensors = ("a.weight", "b.weight", "c.bias", "d.weight")
            assert any(n in str(e) for n in (*names, *tensors, source.name)), e
            assert {p.name for p in source.parent.iterdir()} == beside
            return "refused"
        want = load(source)
        secateur.prune(want, 0.5)
    got = load(out)
    assert {n: bits(t) for n, t in got.items()} == {n: bits(t) for n, t in want.items()}
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert {p.name for p in source.parent.iterdir()} == beside
    return "right"


def damages(raw: bytes, header: int, flips: tuple[int, ...]) -> Iterator[bytes]:
    """Each byte of the header with bits flipped; the file cut at each of them, and around its end; with bytes more."""
    for at in range(header):
        for flip in flips:
            yield raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :]
        yield raw[:at]
    yield from (raw[:header], raw[: header + 1], raw[:-1], raw + b"\0", raw + raw)


def header_of(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def in_every_file(folder: Path, out: Path, flips: tuple[int, ...]) -> dict[str, int]:
    seen = {"refused": 0, "right": 0}
    for file in sorted(p for p in folder.iterdir() if p.name != "config.json"):
        raw = file.read_bytes()
        header = header_of(raw) if file.suffix == ".safetensors" else len(raw)
        for damaged in damages(raw, header, flips):
            file.write_bytes(damaged)
            seen[outcome(folder, out)] += 1
        file.write_bytes(raw)
    assert outcome(folder, out) == "right"
    return seen


def test_headers_and_index_of_shards(tmp_path: Path) -> None:
    folder = save_shards(weights(), tmp_path / "in")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2048
    seen = in_every_file(folder, tmp_path / "out", (1, 0x20))
    assert seen["refused"] > 1500
    assert seen["right"] > 20  # what is said of the format, and of the whole size


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_bit_of_headers_and_index(tmp_path: Path) -> None:
    folder = save_shards(weights(), tmp_path / "in")
    seen = in_every_file(folder, tmp_path / "out", (2, 4, 8, 16, 64, 128, 255))
    assert seen["refused"] > 4000
    assert seen["right"] > 50


def test_one_file_whose_names_nobody_else_knows(tmp_path: Path) -> None:
    """Without an index, a name with another letter is another name; and every length of the file is tried."""
    file = save_one(weights(), tmp_path)
    raw = file.read_bytes()
    seen = {"refused": 0, "right": 0}
    for damaged in (*damages(raw, header_of(raw), (1, 0x20)), *(raw[:n] for n in range(header_of(raw), len(raw)))):
        file.write_bytes(damaged)
        seen[outcome(file, tmp_path / "out.safetensors")] += 1
    assert seen["refused"] > 800
    assert seen["right"] > 20


def test_values_with_other_bits_are_other_values(tmp_path: Path) -> None:
    """NaN and infinities are refused by the tensor's name; the rest is pruned as it is."""
    folder = save_shards(weights(), tmp_path / "in")
    seen = {"refused": 0, "right": 0}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        for at in range(header_of(raw), len(raw), 7):
            for flip in (0x7F, 0x80):
                file.write_bytes(raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :])
                seen[outcome(folder, tmp_path / "out")] += 1
        file.write_bytes(raw)
    assert seen["right"] > 50
