"""What the tests of the kernels share: tensors of every width and content, their keys, and every engine that runs here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur import native

if not native.available():
    pytest.skip("built without the native kernels", allow_module_level=True)

Keys = NDArray[np.uint64]

DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64]  # one a width
VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = [0, 1, 15, 16, 17, 63, 1000, 100_003]
FILLS = ["normal", "equal", "zeros", "few values", "any bits"]


ENGINES = [(native.isas()[-1], 1), *((isa, 2) for isa in native.isas())]


@contextmanager
def running(engine: tuple[str, int]) -> Iterator[None]:
    """With an instruction set and a number of threads."""
    before = native.isa(), torch.get_num_threads()
    native.use_isa(engine[0])
    torch.set_num_threads(engine[1])
    try:
        yield
    finally:
        native.use_isa(before[0])
        torch.set_num_threads(before[1])


def bits_of(t: Tensor) -> Tensor:
    return t.view(VIEWS[t.element_size()])


def all_ones(t: Tensor) -> int:
    return (1 << 8 * t.element_size()) - 1


def keys_of(t: Tensor) -> Keys:
    unsigned = bits_of(t).numpy().reshape(-1).view(f"u{t.element_size()}").astype(np.uint64)
    return unsigned & np.uint64(all_ones(t) >> 1)


def example(n: int, dtype: torch.dtype, fill: str = "normal", offset: int = 1) -> Tensor:
    """A tensor that starts ``offset`` elements into its storage, so that no vector is aligned."""
    g = torch.Generator().manual_seed(n + 7)
    t = torch.empty(n + offset, dtype=dtype)[offset:]
    if fill == "any bits":
        bits_of(t).copy_(torch.randint(-(2**62), 2**62, (n,), generator=g).to(VIEWS[t.element_size()]))
        return t
    value = {
        "normal": torch.randn(n, generator=g),
        "equal": torch.full((n,), -0.5),
        "zeros": torch.tensor([0.0, -0.0]).repeat(n // 2 + 1)[:n],
        "few values": torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0])[torch.randint(5, (n,), generator=g)],
    }[fill]
    return t.copy_(value)


def least(keys: Keys, t: Tensor) -> int:
    return int(keys.min()) if keys.size else all_ones(t)


def greatest(keys: Keys) -> int:
    return int(keys.max()) if keys.size else 0


def thresholds(keys: Keys, t: Tensor) -> list[int]:
    """Keys at and around quantiles, and the ends of the range."""
    if keys.size > 1000:
        return [0, int(keys[0]), 2**64 - 1]
    middle = np.quantile(keys, [0.1, 0.5, 0.9], method="lower").tolist() if keys.size else []
    return [0, 1, *middle, all_ones(t) >> 1, (all_ones(t) >> 1) + 1, 2**64 - 1]


def examples(dtype: torch.dtype) -> Iterator[Tensor]:
    """Every size of ordinary weights, and every other content in two sizes."""
    for n in SIZES:
        yield example(n, dtype)
    for n, fill in itertools.product([17, 1000], FILLS[1:]):
        yield example(n, dtype, fill)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
