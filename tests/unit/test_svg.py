"""Charts: labels that can be told apart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from secateur.report import svg


def test_labels_at_the_ends_of_lines_never_overlap() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        heights = generator.uniform(0, 250, size=6).tolist()
        placed = sorted(svg.spread(heights, 10, 260))
        assert 10 <= placed[0] and placed[-1] <= 260
        assert all(b - a >= svg.LINE_GAP - 1e-9 for a, b in pairwise(placed))
