"""What every test can count on: no network, fixed seeds, threads as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: models come from folders

import hypothesis
import torch

# Examples are the same in every run, so that a failure is a change of the code; `explore` looks further.
# No deadline: machines that run tests are shared, and an example may wait for a core.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds torch, and gives the next test the number of threads this one found."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
