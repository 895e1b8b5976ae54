"""A network of four layers of attention, and which slices make a head of each: written out, not worked out.

Layers as BERT, torch, Llama (two heads share keys and values) and GPT-2 hold them: apart, packed, grouped, and packed in
transposed weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

import secateur
from secateur.core.heads import Head
from tests.contract import oracle
from tests.contract.nets import Kind, values
from tests.contract.oracle import Bools, Floats
from tests.contract.table import DTYPES, OF_ATTENTION

Slices = tuple[slice | int, ...]
ALL = slice(None)

PATTERN: Head = OF_ATTENTION["head:4"]


def rows(start: int, size: int) -> Slices:
    return (slice(start, start + size),)


def columns(start: int, size: int) -> Slices:
    return ALL, slice(start, start + size)


LAYERS: dict[str, list[list[tuple[str, Slices]]]] = {
    "bert.attention": [
        [
            ("bert.attention.output.dense.weight", columns(2 * i, 2)),
            ("bert.attention.self.key.weight", rows(2 * i, 2)),
            ("bert.attention.self.query.weight", rows(2 * i, 2)),
            ("bert.attention.self.value.weight", rows(2 * i, 2)),
        ]
        for i in range(4)
    ],
    "gpt.attn": [
        [
            *(("gpt.attn.c_attn.weight", columns(start + i, 1)) for start in (0, 4, 8)),
            ("gpt.attn.c_proj.weight", rows(i, 1)),
        ]
        for i in range(4)
    ],
    "llama.self_attn": [
        [
            ("llama.self_attn.k_proj.weight", rows(3 * i, 3)),
            ("llama.self_attn.o_proj.weight", columns(6 * i, 6)),
            ("llama.self_attn.q_proj.weight", rows(6 * i, 6)),
            ("llama.self_attn.v_proj.weight", rows(3 * i, 3)),
        ]
        for i in range(2)
    ],
    "mha": [
        [
            *(("mha.in_proj_weight", rows(start + 2 * i, 2)) for start in (0, 8, 16)),
            ("mha.out_proj.weight", columns(2 * i, 2)),
        ]
        for i in range(4)
    ],
}
"""The units of each layer, in the order of layers: names and slices of the tensors' weights."""

BIASES: dict[str, list[list[Slices]]] = {
    **{f"bert.attention.self.{n}.bias": [[rows(2 * i, 2)] for i in range(4)] for n in ("query", "key", "value")},
    "gpt.attn.c_attn.bias": [[rows(start + i, 1) for start in (0, 4, 8)] for i in range(4)],
    "llama.self_attn.q_proj.bias": [[rows(6 * i, 6)] for i in range(2)],
    "mha.in_proj_bias": [[rows(start + 2 * i, 2) for start in (0, 8, 16)] for i in range(4)],
}
"""The slices of biases that go with each unit of their layer."""

CHOSEN = tuple(sorted({name for units in LAYERS.values() for unit in units for name, _ in unit}))
LEFT = ("bert.attention.output.dense.bias", "gpt.attn.c_proj.bias", "mha.out_proj.bias", "fc.weight", "fc.bias")
"""What no head takes along."""


class Conv1D(nn.Module):
    """A linear layer stored (in, out), as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))


def tree(children: Mapping[str, nn.Module]) -> nn.Module:
    """A module with children by dotted names."""
    root = nn.Module()
    for path, module in children.items():
        here, steps = root, path.split(".")
        for step in steps[:-1]:
            if not hasattr(here, step):
                here.add_module(step, nn.Module())
            here = here.get_submodule(step)
        here.add_module(steps[-1], module)
    return root


def attentive(dtype: str = "float32", kind: Kind = "plain", seed: int = 0) -> nn.Module:
    """The network, the same in every call; of several dtypes, each in turn."""
    g = torch.Generator().manual_seed(seed)
    model = tree(
        {
            **{f"bert.attention.self.{n}": nn.Linear(5, 8) for n in ("query", "key", "value")},
            "bert.attention.output.dense": nn.Linear(8, 5),
            "gpt.attn.c_attn": Conv1D(12, 4),
            "gpt.attn.c_proj": Conv1D(4, 4),
            "llama.self_attn.q_proj": nn.Linear(6, 12),
            "llama.self_attn.k_proj": nn.Linear(6, 6, bias=False),
            "llama.self_attn.v_proj": nn.Linear(6, 6, bias=False),
            "llama.self_attn.o_proj": nn.Linear(12, 6, bias=False),
            "mha": nn.MultiheadAttention(8, 4),
            "fc": nn.Linear(4, 4),
        }
    )
    kinds = DTYPES[dtype]
    for i, (_, p) in enumerate(model.named_parameters()):
        own = kinds[i % len(kinds)] if isinstance(kinds, tuple) else kinds
        drawn = values(tuple(p.shape), kind, g) if p.dim() > 1 else torch.rand(p.shape, generator=g) + 0.5
        p.data = drawn.to(own)
    return model


def pool_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the projections' weights."""
    return {n: model.get_parameter(n).detach().clone() for n in CHOSEN}


def size_of(layer: str) -> int:
    """How many weights a layer of attention has."""
    shapes = {n: p.shape for n, p in attentive().named_parameters()}
    return sum(shapes[n].numel() for n in {name for name, _ in LAYERS[layer][0]})


def unit_sizes(layer: str) -> list[int]:
    """How many weights each of a layer's units has."""
    pool = pool_of(attentive())
    return [sum(pool[n][s].numel() for n, s in unit) for unit in LAYERS[layer]]


def scores(criterion: object, layer: str, pool: Mapping[str, Tensor], reduce: str, nonfinite: str = "error") -> Floats:
    """The score of each unit of a layer: minus infinity for one that is wholly zero, infinity for one that is kept."""
    each = {n: oracle.scores(criterion, n, pool[n], nonfinite) for n, _ in LAYERS[layer][0]}
    numbers = torch.arange(len(LAYERS[layer]))
    drawn = oracle.wide(criterion(numbers, name=layer, index=numbers)) if is_random(criterion) else None  # type: ignore[operator]
    out = []
    for i, unit in enumerate(LAYERS[layer]):
        s = np.concatenate([each[n][where].ravel() for n, where in unit])
        live, kept = s[s != -np.inf], (s == np.inf).any()
        plain = np.where(np.isfinite(s), s, 0.0)
        own = {
            "mean": plain.sum() / s.size,
            "l1": plain.sum(),
            "l2": np.sqrt((plain**2).sum()),
            "max": max(live[np.isfinite(live)], default=-np.inf),
        }[reduce]
        own = own if drawn is None else drawn[i]
        out.append(-np.inf if not live.size else np.inf if kept else own)
    return np.array(out)


def is_random(criterion: object) -> bool:
    """Whether a criterion is an order by hashes, which units have by their number."""
    return isinstance(criterion, type(secateur.random(0)))


def units_gone(
    criterion: object, layers: list[str], pool: Mapping[str, Tensor], k: int, reduce: str, nonfinite: str = "error"
) -> dict[str, list[bool]]:
    """Which units of some layers go: in order, as many as together have at most ``k`` weights, and those that are dead."""
    table = [(s, layer, i) for layer in layers for i, s in enumerate(scores(criterion, layer, pool, reduce, nonfinite))]
    order = sorted(range(len(table)), key=lambda j: table[j][0])  # stable: layers, then units
    gone = {layer: [False] * len(LAYERS[layer]) for layer in layers}
    used, open_ = 0, True
    for j in order:
        score, layer, i = table[j]
        used += unit_sizes(layer)[i]
        open_ = open_ and used <= k
        gone[layer][i] = open_ or score == -np.inf
    return gone


def masks(gone: Mapping[str, list[bool]], pool: Mapping[str, Tensor], nonfinite: str = "error") -> dict[str, Bools]:
    """Where everything lies that is zero afterwards, zeros of before included."""
    out = {n: (oracle.wide(t) == 0) | (oracle.bad(t) & (nonfinite == "prune")) for n, t in pool.items()}
    for layer, which in gone.items():
        for unit, goes in zip(LAYERS[layer], which, strict=True):
            for name, where in unit if goes else ():
                out[name][where] = True
    return out
