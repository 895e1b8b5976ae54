"""Whether the processes of one training hold the same masks, and act together where they look at masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from secateur.core.request import Request
from secateur.core.types import Spec
from secateur.engines.ranks import Ranks
from secateur.errors import NotDefined
from secateur.stores.dtensor import ShardedStore
from secateur.stores.memory import MemoryStore

Method = TypeVar("Method", bound=Callable[..., Any])


def together(method: Method) -> Method:
    """A method of what has a store, in which an error of one process reaches all that share the store's tensors."""

    @wraps(method)
    def inside(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._store.together():
            return method(self, *args, **kwargs)

    return cast(Method, inside)


def check_sharded(store: MemoryStore, asked: Request, specs: list[Spec], rewire: object) -> None:
    """Refuses what is not defined for a model that is cut over processes.

    Raises:
        NotDefined: ``rewire``, which compares the weights of whole tensors; what `ShardedStore.check_request` refuses.
        BadInput: the processes do not ask for the same.
    """
    if not isinstance(store, ShardedStore):
        return
    if rewire is not None:
        raise NotDefined(
            "rewire compares the weights and gradients of whole tensors, and of DTensors no process has them: leave rewire out, "
            "or train with DistributedDataParallel."
        )
    store.check_request(asked, specs)


def check_alike(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuses masks, packed, that are not the same in every process of a `DistributedDataParallel`; others are not asked.

    Raises:
        BadInput: they differ, so that the copies of the model would drift apart.
    """
    ddp = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if ddp is None:
        return
    digest = hashlib.sha256()
    for name, bits in sorted(masks.items()):
        digest.update(name.encode() + b"\0" + bits.cpu().numpy().tobytes())
    Ranks(ddp.process_group).agree(
        digest.digest(),
        "it holds other masks. Prune the same weights in every process, by the same criterion and schedule: was one seeded "
        "differently, or were weights loaded in one alone?",
    )
