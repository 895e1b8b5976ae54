"""The generators that training may draw from: torch's, numpy's and Python's, together."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from secateur.errors import BadInput


def check_seed(seed: Any) -> int:
    """Refuses what the generators of torch, numpy and Python do not all take as a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 1 << 32:
        raise BadInput(f"a seed is an int between -2**32 and 2**32; got {seed!r}.")
    return seed


def seed_all(seed: int) -> None:
    """Seeds every generator that training may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def get_random() -> dict[str, Any]:
    """The state of every generator that training may draw from."""
    found: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = found
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(words), gauss],
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random(state: Mapping[str, Any]) -> None:
    """Takes them back to where `get_random` found them."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
