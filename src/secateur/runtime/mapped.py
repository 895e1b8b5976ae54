"""Weights in mapped files: what stays behind of a file when some of its tensors are not needed any more."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from pathlib import Path

from torch import Tensor, nn

from secateur.stores.checks import is_plain
from secateur.stores.memory import view_of

MAPS = Path("/proc/self/maps")


class Mappings:
    """The files that this process has mapped for itself; none where the system does not tell (only Linux does)."""

    def __init__(self) -> None:
        try:
            lines = MAPS.read_text("utf-8", "replace").splitlines()
        except OSError:
            lines = []
        found = []
        for line in lines:
            span, access, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and access[3] == "p" and path:
                begin, end = (int(n, 16) for n in span.split("-"))
                found.append((begin, end, path[0]))
        self._found = sorted(found)
        self._begins = [begin for begin, _, _ in self._found]

    def file(self, t: Tensor) -> str | None:
        """The file that a tensor lies in."""
        if not is_plain(t) or t.device.type != "cpu" or not t.numel():
            return None
        at = bisect_right(self._begins, t.data_ptr()) - 1
        return self._found[at][2] if at >= 0 and t.data_ptr() < self._found[at][1] else None


def copy_out(model: nn.Module, files: set[str]) -> None:
    """Gives tensors of a model that lie in these mapped files memory of their own, tied ones the same.

    A file stays mapped, with every page that was written to, until none of its tensors is left. Parameters and buffers stay
    the objects that they are.
    """
    if not files:
        return
    mappings = Mappings()
    moved: dict[object, Tensor] = {}
    for t in itertools.chain(model.parameters(), model.buffers()):
        if mappings.file(t) in files and not t.is_inference():
            t.data = moved.setdefault(view_of(t), t.detach().clone())
