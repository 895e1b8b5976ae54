"""secateur: prunes neural networks by magnitude, exactly and in one line.

>>> import torch, secateur
>>> model = torch.nn.Linear(100, 10)
>>> secateur.prune(model, 0.9).sparsity
0.9
"""

import importlib
import typing

from secateur.api import apply, from_torch_prune, inspect, masks, plan, prune
from secateur.core import saliency as criteria
from secateur.core import schedules
from secateur.core import solve as solvers
from secateur.core.criteria import elementwise, magnitude, random
from secateur.core.heads import Head
from secateur.core.owl import OWL
from secateur.core.patterns import NM, Block, Channel, Row, Unstructured
from secateur.core.plan import Plan
from secateur.errors import (
    BadInput,
    BadTensor,
    Infeasible,
    NotDefined,
    NothingChosen,
    OutputExists,
    PlanMismatch,
    SecateurError,
    SecateurWarning,
)
from secateur.evaluate.batchnorm import recalibrate_batchnorm
from secateur.evaluate.calibrate import Calibration, calibrate
from secateur.evaluate.flops import Flops, count_flops
from secateur.files import Files
from secateur.report.report import Report
from secateur.runtime.modules import pack, unpack
from secateur.stores.planfile import load_plan, save_plan
from secateur.train import dynamic, regularize
from secateur.train.iterative import iterate
from secateur.train.pruner import Pruner

if typing.TYPE_CHECKING:
    from secateur.evaluate.compare import compare
    from secateur.evaluate.sensitivity import sensitivity
    from secateur.runtime.bench import bench
    from secateur.runtime.export import export
    from secateur.runtime.files import save_packed, unpack_file
    from secateur.runtime.load import from_packed, load_packed
    from secateur.stores.verify import verify

__version__ = "0.1.0"

# Imported by those who use them: each brings a part of the house that pruning does not need.
_LATER = {
    "bench": "secateur.runtime.bench",
    "compare": "secateur.evaluate.compare",
    "export": "secateur.runtime.export",
    "from_packed": "secateur.runtime.load",
    "load_packed": "secateur.runtime.load",
    "save_packed": "secateur.runtime.files",
    "sensitivity": "secateur.evaluate.sensitivity",
    "unpack_file": "secateur.runtime.files",
    "verify": "secateur.stores.verify",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "NM",
    "OWL",
    "BadInput",
    "BadTensor",
    "Block",
    "Calibration",
    "Channel",
    "Files",
    "Flops",
    "Head",
    "Infeasible",
    "NotDefined",
    "NothingChosen",
    "OutputExists",
    "Plan",
    "PlanMismatch",
    "Pruner",
    "Report",
    "Row",
    "SecateurError",
    "SecateurWarning",
    "Unstructured",
    "apply",
    "bench",
    "calibrate",
    "compare",
    "count_flops",
    "criteria",
    "dynamic",
    "elementwise",
    "export",
    "from_packed",
    "from_torch_prune",
    "inspect",
    "iterate",
    "load_packed",
    "load_plan",
    "magnitude",
    "masks",
    "pack",
    "plan",
    "prune",
    "random",
    "recalibrate_batchnorm",
    "regularize",
    "save_packed",
    "save_plan",
    "schedules",
    "sensitivity",
    "solvers",
    "unpack",
    "unpack_file",
    "verify",
]
