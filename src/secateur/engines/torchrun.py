"""The ranks of a program under ``torchrun`` that share work on files: what they tell each other beside counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from secateur.errors import BadInput, SecateurError

Result = TypeVar("Result")


class Workers:
    """This rank among the others of the default group, all of which call the same methods in the same order.

    Raises:
        BadInput: the program does not run under ``torchrun``, and has no process group.
    """

    def __init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise BadInput(
                'engine "torch" is for the ranks of a program under torchrun: call torch.distributed.init_process_group first, '
                "or run the command line as torchrun --nproc-per-node N -m secateur.cli …"
            )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def first(self, work: Callable[[], Result]) -> Result:
        """What rank 0 makes of it, on all; what it raises, all raise."""
        box: list[Any] = [None]
        if self.rank == 0:
            box[0] = _tried(work)
        dist.broadcast_object_list(box, src=0)
        return _opened(box[0])

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """What each rank makes of it, on all; what one raises, all raise."""
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, _tried(work))
        return [_opened(box) for box in boxes]


def _tried(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as e:
        return None, e


def _opened(box: tuple[Any, Exception | None]) -> Any:
    if box[1] is not None:
        raise (
            box[1] if isinstance(box[1], SecateurError | OSError) else SecateurError(f"a rank failed: {box[1]!r}")
        ) from box[1]
    return box[0]


@contextmanager
def joined() -> Iterator[None]:
    """A process group from what ``torchrun`` says, for a command that runs under it; left when the block ends."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()
