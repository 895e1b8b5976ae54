"""Processes of one `torch.distributed` group that do the same work: counts add up over them, and an error of one reaches all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur import errors
from secateur.errors import BadInput, SecateurError

ROOM = 63
"""Counts that are sent along with the word that all is well."""


class Ranks:
    """The processes of a group, seen from one of them. All of them make the same calls, in the same order.

    Args:
        group: of `torch.distributed`; the default group, if ``None``.

    Attributes:
        rank: the number of this process in the group.
        size: how many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._inside = self._heard = self._lost = False

    def sum(self, counts: Tensor) -> Tensor:
        """``counts`` (int64, of one shape everywhere) added over all processes.

        Raises:
            SecateurError: one of them has failed, or does not answer.
        """
        flat = counts.reshape(-1)
        if (few := len(flat)) > ROOM:
            self.go_on()
            return self._added(counts)
        return self._well(flat)[:few].to(counts.device).view(counts.shape)

    def copied(self, t: Tensor, source: int, group: Any) -> Tensor:
        """A copy of a tensor of the process ``source``, by its number in the default group, for those of another group."""
        sent = t.to(_device(t, group), copy=True)
        with self._answering():
            dist.broadcast(sent, source, group)
        return sent.to(t.device)

    def handed(self, t: Tensor, among: Sequence[int]) -> Tensor:
        """A copy of a tensor of the first of some processes, for the others; only they call."""
        sent = t.to(_device(t, self._group), copy=True)
        with self._answering():
            if self.rank == among[0]:
                for other in among[1:]:
                    dist.send(sent, other, self._group)
            else:
                dist.recv(sent, among[0], self._group)
        return sent.to(t.device)

    def told(self, mine: Tensor) -> Tensor:
        """What each process says (int64, of one shape), stacked by its number."""
        every = torch.zeros((self.size, *mine.shape), dtype=torch.int64)
        every[self.rank] = mine
        return self.sum(every)

    def agree(self, facts: bytes, what: str) -> None:
        """Refuses facts that are not the same in all processes; ``what`` says whose they are, and what to do.

        Raises:
            BadInput: they differ.
        """
        digest = int.from_bytes(hashlib.sha256(facts).digest()[:8], "little", signed=True)
        found = self.told(torch.tensor(digest)).tolist()
        if others := [r for r, digest in enumerate(found) if digest != found[0]]:
            raise BadInput(f"rank {others[0]} differs from rank 0 ({len(others)} of {self.size} do): {what}.")

    def go_on(self) -> None:
        """Tells the others that all is well here, and hears whether it is with them."""
        self._well(torch.zeros(0, dtype=torch.int64))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside it, an error that one process raises is raised by all of them, instead of leaving the others to wait."""
        if self._inside:
            yield
            return
        self._inside, self._heard = True, False
        try:
            yield
        except Exception as e:
            if not self._heard and not self._lost:
                self._well(torch.zeros(0, dtype=torch.int64), failed=True)
                self._hear(e)
            raise
        else:
            self.go_on()
        finally:
            self._inside = False

    def _well(self, counts: Tensor, failed: bool = False) -> Tensor:
        """A few counts added over all processes, with a word of each on whether it has failed.

        What is sent is of one size: a process that fails does not know what the others are about to count.
        """
        sent = torch.zeros(1 + ROOM, dtype=torch.int64)
        sent[0] = failed
        sent[1 : 1 + len(counts)] = counts
        total = self._added(sent)
        if not failed and int(total[0]):
            self._hear(None)
        return total[1:]

    def _hear(self, mine: Exception | None) -> None:
        """Raises the error of the first process that has one, unless it is this one's."""
        self._heard = True
        told: list[tuple[str, str] | None] = [None] * self.size
        with self._answering():
            dist.all_gather_object(told, mine and (type(mine).__name__, str(mine)), self._group)
        rank, (kind, text) = next((r, t) for r, t in enumerate(told) if t is not None)
        if mine is not None and (kind, text) == told[self.rank]:
            return
        known = getattr(errors, kind, None)
        error = known(text) if known is not None else SecateurError(f"rank {rank} failed, {kind}: {text}")
        raise error from mine

    def _added(self, counts: Tensor) -> Tensor:
        total = counts.to(_device(counts, self._group), copy=True).contiguous()
        with self._answering():
            dist.all_reduce(total, group=self._group)
        return total.to(counts.device)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            self._lost = True
            raise SecateurError(
                f"rank {self.rank} waits for others that do not answer: one has ended, or does other work. {e}"
            ) from e


def _device(t: Tensor, group: Any) -> str | torch.device:
    """Where a group can send a tensor from: where it is, or where its backend works (NCCL: on GPUs alone)."""
    can = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return t.device if t.device.type in can else can[0]
