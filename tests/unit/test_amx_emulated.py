"""The AMX kernels on processors without AMX: compiled with a program in the place of the tiles."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from secateur import native
from secateur.core.layouts import LAYOUTS, Layout, arrange
from secateur.native import products as kernels
from tests.property.test_products import ACCURACY, METHODS, drawn, off

SOURCES = Path(__file__).parents[2] / "csrc"
HERE = Path(__file__).parent / "amx"
FLAGS = [
    "-march=x86-64-v4", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
    f'-DSECATEUR_AMX_EMULATOR="{HERE / "emulator.h"}"',
]  # fmt: skip


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not (shutil.which("c++") and SOURCES.is_dir() and native.available() and "avx512bf16" in kernels.isas()):
        pytest.skip("needs the source tree, a C++ compiler and AVX-512 with bf16 and VBMI2")
    folder = tmp_path_factory.mktemp("amx")
    common = ["c++", "-std=c++17", "-O1", "-w", "-fPIC", f"-I{SOURCES}"]
    tiles = subprocess.run([*common, *FLAGS, "-c", str(SOURCES / "kern/product_amx.cpp"), "-o", str(folder / "amx.o")])
    if tiles.returncode:
        pytest.skip("the compiler does not know AMX")
    rest = [str(SOURCES / f"{n}.cpp") for n in ("product", "product_inputs", "product_rounding", "pool")]
    out = folder / "amx.so"
    subprocess.run(
        [*common, "-shared", *rest, str(HERE / "library.cpp"), str(folder / "amx.o"), "-o", str(out)], check=True
    )
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ACCURACY)
def test_that_they_agree_with_float64(amx: ctypes.CDLL, dtype: torch.dtype, layout: Layout, method: str) -> None:
    """One and two tiles of rows and of inputs, and what does not fill one."""
    for rows, columns, n in ((1, 1, 1), (16, 32, 16), (17, 65, 15), (33, 300, 33), (70, 4500, 50), (40, 64, 0)):
        weight, x, _ = drawn(rows, columns, n, 0.3, dtype, rows)
        parts, y = arrange(weight, layout), torch.full((n, rows), torch.nan, dtype=dtype)
        addresses = [ctypes.c_void_p(p.data_ptr()) for p in parts]
        size = ctypes.c_uint64
        amx.amx_product(
            ctypes.c_bool(layout == "bitmask"), kernels.DTYPES[dtype], *addresses, size(rows), size(columns),
            ctypes.c_void_p(x.data_ptr()), size(n), ctypes.c_void_p(y.data_ptr()), kernels.METHODS[method],
        )  # fmt: skip
        assert off(y, x, weight, None) <= ACCURACY[dtype]
