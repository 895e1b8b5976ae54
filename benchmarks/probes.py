"""Questions to two tools, answered live: what happens to a model that is pruned by secateur and by torch itself.

``python -m benchmarks probes`` prints the table; ``--docs`` also writes it to ``docs/probes.md``.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import child, machine
from benchmarks.result import Result, Table
from benchmarks.tools import TOOLS, Answer, NotOffered, Tool, sparsity_of, zeros_of
from benchmarks.training_probes import TRAINING_PROBES

PAGE = Path(__file__).parents[1] / "docs" / "probes.md"


def twice(tool: Tool) -> Answer:
    """P1. Pruned to 0.5 twice, a layer is at 0.5."""
    layer = nn.Linear(100, 100)
    tool.prune(layer, 0.5)
    tool.prune(layer, 0.5)
    found = sparsity_of(layer.weight)
    return Answer(found == 0.5, f"{found:g}")


def round_trips(tool: Tool) -> Answer:
    """P2. A pruned model can be copied, pickled, saved, and exchanges its `state_dict` with a dense one, strictly."""
    dense, model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    tool.prune(model[0], 0.5)
    attempts: dict[str, Callable[[], object]] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": lambda: _saved(model),
        "state_dict into a dense model": lambda: copy.deepcopy(dense).load_state_dict(model.state_dict()),
        "state_dict of a dense model": lambda: model.load_state_dict(dense.state_dict()),
    }
    failed = {what: type(e).__name__ for what, run in attempts.items() if (e := _error(run)) is not None}
    told = ", ".join(f"{what} raises {error}" for what, error in failed.items())
    return Answer(not failed, told or f"all {len(attempts)} ways")


def _saved(model: nn.Module) -> object:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _error(run: Callable[[], object]) -> Exception | None:
    try:
        run()
    except Exception as e:  # what a tool does to a model may raise anything
        return e
    return None


class Tied(nn.Module):
    """A table of words that is also the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 20)
        self.head = nn.Linear(20, 50, bias=False)
        self.head.weight = self.words.weight


def tied(tool: Tool) -> Answer:
    """P4. A head tied to an embedding is pruned with it, once, and is still tied."""
    model = Tied()
    tool.prune_named(model, "head.weight", 0.5)
    head, words = sparsity_of(model.head.weight), sparsity_of(model.words.weight)
    together = model.head.weight is model.words.weight
    seen = f"head {head:g}, embedding {words:g}, {'still' if together else 'no longer'} one tensor"
    return Answer(together and head == words == 0.5, seen)


def exact(tool: Tool) -> Answer:
    """P7. The count is exact where all magnitudes are equal, and in bf16, where millions share a few thousand."""
    layer = nn.Linear(100, 100)
    nn.init.ones_(layer.weight)
    tool.prune(layer, 0.5)
    found, asked = {"all equal": zeros_of(layer)}, {"all equal": 5000}
    for sparsity in (0.5, 0.8, 0.9):
        layer = nn.Linear(1000, 1000, dtype=torch.bfloat16)
        nn.init.normal_(layer.weight)
        tool.prune(layer, sparsity)
        found[f"bf16 {sparsity:g}"], asked[f"bf16 {sparsity:g}"] = zeros_of(layer), round(1e6 * sparsity)
    return Answer(found == asked, ", ".join(f"{what}: {n:,}" for what, n in found.items()))


MOST_MEMORY, MOST_SECONDS = 3.0, 0.5


def pooled(tool: Tool, weights: int = 10_000_000) -> Answer:
    """P8. Global pruning of 10 M fp32 weights takes less than 3 times their memory, and 0.5 s on one thread."""
    sides = {"name": tool.name, "side": round((weights / 10) ** 0.5)}
    idle = child.call("benchmarks.probes", "pooled_child", act=False, **sides)
    busy = child.call("benchmarks.probes", "pooled_child", act=True, **sides)
    memory = max(0.0, busy["peak"] - idle["peak"]) / busy["bytes"]
    passed = memory < MOST_MEMORY and busy["seconds"] < MOST_SECONDS
    return Answer(passed, f"{memory:.2g}x the weights' memory, {busy['seconds']:.2g} s on one thread")


def pooled_child(name: str, side: int, act: bool) -> dict[str, float]:
    """In a child: ten layers pruned as one pool (or only built)."""
    torch.set_num_threads(1)
    layers = [nn.Linear(side, side) for _ in range(10)]
    start = time.perf_counter()
    if act:
        TOOLS[name].prune_all(layers, 0.9)
    return {
        "seconds": time.perf_counter() - start, "peak": machine.peak_bytes(),
        "bytes": sum(m.weight.nbytes for m in layers),
    }  # fmt: skip


def two_of_four(tool: Tool) -> Answer:
    """P11. 2:4 on `Linear` and `Conv2d`, verified in the saved file: of every four along the input the two largest."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32))
    dense = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.safetensors"
        try:
            tool.two_of_four(model, out)
        except NotOffered as e:
            return Answer(False, str(e))
        saved = load_file(out)
    groups = {n: _groups_that_hold(w, saved[n]) for n, w in dense.items()}
    told = ", ".join(f"{n} {tuple(dense[n].shape)}: {good} of {all_}" for n, (good, all_) in groups.items())
    return Answer(all(good == all_ for good, all_ in groups.values()), f"groups that hold: {told}")


def _groups_that_hold(dense: Tensor, saved: Tensor) -> tuple[int, int]:
    """(groups of four along dim 1 in which exactly the two largest are left, groups), by brute force."""
    before = dense.movedim(1, -1).reshape(-1, 4).tolist()
    after = saved.movedim(1, -1).reshape(-1, 4).tolist()
    good = 0
    for b, a in zip(before, after, strict=True):
        largest = sorted(range(4), key=lambda i: abs(b[i]))[2:]
        good += a == [x if i in largest else 0.0 for i, x in enumerate(b)]
    return good, len(before)


LEAST_SMALLER = 5.0
_READ = """
import json, sys
sys.modules["secateur"] = None
{reader}
from safetensors.torch import save_file
save_file(read(sys.argv[1]), sys.argv[2])
print(json.dumps(None))
"""


def small(tool: Tool) -> Answer:
    """P12. Pruned to 0.9, a network takes less than a fifth of its file, and torch and safetensors alone read it again."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    with tempfile.TemporaryDirectory() as folder:
        dense, out, again = (Path(folder) / f"{name}.safetensors" for name in ("dense", "small", "again"))
        save_file(model.state_dict(), dense)
        tool.prune_all([model[0], model[2]], 0.9)
        reader = tool.save(model, out)
        child.script(_READ.format(reader=reader), str(out), str(again))
        read, left = load_file(again), model.state_dict()
        smaller = dense.stat().st_size / out.stat().st_size
    same = sum(torch.equal(read[n], t) for n, t in left.items() if n in read)
    told = f"{smaller:.2g}x smaller, {same} of {len(left)} tensors read again"
    return Answer(smaller > LEAST_SMALLER and same == len(left) == len(read), told)


_ONE_SHOT: dict[str, Callable[[Tool], Answer]] = {
    "P1": twice, "P2": round_trips, "P4": tied, "P7": exact, "P8": pooled, "P11": two_of_four,
    "P12": small,
}  # fmt: skip
PROBES = dict(sorted({**_ONE_SHOT, **TRAINING_PROBES}.items(), key=lambda probe: int(probe[0][1:])))


def question(probe: Callable[..., Any]) -> str:
    """What a probe asks, from its docstring, without its number."""
    return " ".join((probe.__doc__ or "").partition(". ")[2].split())


def run(full: bool) -> Result:
    """Puts every probe to every tool."""
    before = machine.load()
    torch.manual_seed(0)
    rows = [(name, question(probe), *(str(probe(tool)) for tool in TOOLS.values())) for name, probe in PROBES.items()]
    table = Table(f"{len(PROBES)} probes", ("<", "<asked", *(f"<{name}" for name in TOOLS)), rows)
    return Result("probes", "python -m benchmarks probes --docs", machine.machine(before), [table])


def write_page(result: Result) -> None:
    """Writes the table to `PAGE`."""
    PAGE.write_text(_PAGE.format(found=result.markdown()), encoding="utf-8")


_PAGE = """\
# Probes

What happens to a model that is pruned and trained, asked of secateur and of `torch.nn.utils.prune` in the same words
(`benchmarks/probes.py`, `benchmarks/training_probes.py`). "yes" means that the tool does what is asked; what follows is what
was seen. This page is written by the command below; a test runs secateur's side again, P8 with fewer weights.

{found}

What the numbers leave out:

- P1: `amount` of `torch.nn.utils.prune` is a share of what is not yet pruned, so asking again prunes more. secateur's
  `sparsity` is absolute.
- P2: `torch.nn.utils.prune` stores `weight_orig` and `weight_mask` and computes `weight`; `torch.nn.utils.prune.remove` makes
  plain parameters of them, and `secateur.from_torch_prune` does so for a whole model. secateur writes zeros into the parameter
  that is there.
- P3: both hold the zeros. `torch.nn.utils.prune` leaves what the optimizer remembered of the weights at the moment of
  pruning, and the weight decay of SGD adds to it. With either tool nothing holds the zeros afterwards: the next step of an
  ordinary loop moves them, unless `secateur.Pruner(model, optimizer)` holds them again.
- P4: an output head that is tied to an embedding is skipped by default, as every head and embedding is; here it is named in full.
  With `torch.nn.utils.prune` the parameter (`weight_orig`) stays shared, but the mask is the head's alone: the embedding
  is used whole, and what the two modules use is no longer one tensor.
- P5: `torch.nn.utils.prune` computes the weight of `out_proj` in a hook before that module's own forward pass, which
  `nn.MultiheadAttention` does not call.
- P6: neither gives a stale result.
- P7: both are exact.
- P10: both are exact. The loop over `torch.nn.utils.prune` is written by hand (`benchmarks/tools.py`); its optimizer has to
  be made before the masks, since afterwards the parameters come in another order, by which an optimizer's state is loaded.
- P11: with `torch.nn.utils.prune` a 2:4 mask can be made by hand and given to `custom_from_mask`.
- P12: secateur's file is the [packed format](format.md), read by the function on its page; `torch.nn.utils.prune` leaves zeros in
  a dense weight.
"""


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["probes"])
