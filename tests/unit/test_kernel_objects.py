"""What a kernel object may hold: its table, and nothing that the linker could take for somebody else's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "csrc" / "kern"
AVX512 = ["-march=x86-64-v4", "-mavx512vbmi", "-mavx512vbmi2"]
FLAGS = {
    "base": [], "avx2": ["-march=x86-64-v3"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"],
    "crc": ["-march=x86-64-v2", "-mpclmul"], "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("c++")), reason="needs nm and a C++ compiler"),
    pytest.mark.skipif(not (sys.platform.startswith("linux") and KERNELS.is_dir()), reason="reads ELF objects"),
]


def objects() -> list[str]:
    return sorted(p.stem for p in KERNELS.glob("*.cpp"))


def test_that_all_are_looked_at() -> None:
    assert {o.removeprefix("product_") for o in objects()} == set(FLAGS)


@pytest.mark.parametrize("name", objects())
def test_kernel_objects_share_no_functions(tmp_path: Path, name: str) -> None:
    """A function that two objects hold could be linked in the copy that only some processors can run."""
    isa, built = name.removeprefix("product_"), tmp_path / "kernel.o"
    compile_it = ["c++", "-std=c++17", "-O1", "-w", *FLAGS[isa], "-c", str(KERNELS / f"{name}.cpp"), "-o", str(built)]
    subprocess.run(compile_it, check=True)
    listing = subprocess.run(["nm", "-C", built], check=True, capture_output=True, text=True).stdout
    found = [re.fullmatch(r"[0-9a-f]* +(\w) (.+)", line) for line in listing.splitlines()]
    symbols = [m.groups() for m in found if m is not None]
    assert len(symbols) == len(found)
    table = "products" if name.startswith("product_") else "kernels"
    tables, functions = [f"secateur::{table}_{isa}"], []
    if name == "crc":  # not one of several: a name of its own
        tables, functions = [], ["secateur::crc32_clmul(unsigned char const*, unsigned long, unsigned int)"]
    assert [symbol for kind, symbol in symbols if kind in "DRB"] == tables
    assert [symbol for kind, symbol in symbols if kind in "WwVvuT"] == functions
