"""Two processes prune a model, and one of them is killed in the midst of it.

``python -m tests.contract.sharded_killed RANK WORLD FOLDER``; the other one has to end by an error, with exit code 3.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

import secateur
from tests.contract.nets import net
from tests.contract.processes import TIMEOUT, join
from tests.contract.sharded import fsdp


@secateur.elementwise
def deadly(weight: Tensor) -> Tensor:
    """Kills the last process."""
    if dist.get_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    return weight.abs()


if __name__ == "__main__":
    join(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    model = net()
    fsdp(model)
    start = time.monotonic()
    try:
        secateur.prune(model, 0.5, criterion=deadly)
    except secateur.errors.SecateurError as e:
        print(e)
        os._exit(3 if time.monotonic() - start < TIMEOUT + 5 else 4)  # without a word to the process that is gone
