"""Which tensors are the projections of one layer of attention, by their names and shapes.

For modules, dicts and files alike. A layer is an output projection and the projections of queries, keys and values, apart or
packed in one; the names are those of transformers, timm, diffusers and torch. Heads lie one after another in each projection. In
packed ones they do so inside the queries, then the keys, then the values, but under ``query_key_value`` (GPT-NeoX, BLOOM,
Falcon), where each head or group of heads has its own queries, keys and values together.

Not told apart by names, and cut in the wrong places: GPT-BigCode without multi-query attention, which has GPT-2's names and keeps
each head's queries, keys and values together. Not known: latent attention (DeepSeek), attention of convolutions, XLNet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from secateur.core.types import Attention, Member, Spec

from .siblings import join

LAYERS: tuple[tuple[Mapping[str, str], tuple[str, ...]], ...] = (
    ({"q_proj": "q", "k_proj": "k", "v_proj": "v"}, ("o_proj", "out_proj", "dense", "proj", "c_proj")),
    ({"query": "q", "key": "k", "value": "v"}, ("^output.dense", "dense", "out_proj", "o_proj", "out", "proj")),
    ({"query_proj": "q", "key_proj": "k", "value_proj": "v"}, ("^output.dense", "out_proj", "o_proj")),
    ({"q_lin": "q", "k_lin": "k", "v_lin": "v"}, ("out_lin",)),
    ({"q": "q", "k": "k", "v": "v"}, ("o", "out", "proj")),
    ({"wq": "q", "wk": "k", "wv": "v"}, ("wo",)),
    ({"to_q": "q", "to_k": "k", "to_v": "v"}, ("to_out.0", "to_out")),
    ({"q_attn": "q", "c_attn": "kv"}, ("c_proj",)),
    ({"c_attn": "qkv"}, ("c_proj",)),
    ({"qkv": "qkv"}, ("proj", "projection", "out_proj", "o_proj")),
    ({"Wqkv": "qkv"}, ("out_proj", "Wo")),
    ({"qkv_proj": "qkv"}, ("o_proj",)),
    ({"query_key_value": "heads"}, ("dense",)),
    ({"in_proj_weight": "qkv"}, ("out_proj",)),
    ({"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}, ("out_proj",)),
)
"""The projections of a layer and what each holds, and the names its output projection may have: beside them, or with ``^`` beside
the module that holds them. ``"heads"``: queries, keys and values head by head."""

ROLES = ("linear", "linear_transposed", "attention")


def places(specs: Sequence[Spec]) -> dict[str, Attention]:
    """The place of each tensor that belongs to a layer of attention, by canonical name.

    A tensor that several layers share belongs to none, unless they share all.

    >>> import torch
    >>> names = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj")
    >>> specs = [Spec(f"{n}.weight", (8, 8), torch.float32, "linear", 0, 1) for n in names]
    >>> place = places(specs)["attn.o_proj.weight"]
    >>> place.layer, place.dim, place.sections
    ('attn', 1, (8,))
    """
    by_name = {n: s for s in specs for n in (*s.aliases, s.name)}
    first: dict[str, list[str]] = {next(iter(held)): [] for held, _ in LAYERS}
    for name in by_name:
        if (last := name.removesuffix(".weight").rpartition(".")[2]) in first:
            first[last].append(name)
    layers: dict[frozenset[str], dict[str, Attention]] = {}
    taken: set[str] = set()
    for held, outs in LAYERS:
        for name in sorted(first[next(iter(held))], key=lambda n: (n != by_name[n].name, n)):  # other names come last
            path = name.removesuffix(".weight").rpartition(".")[0]
            inputs = [join(path, _leaf(token)) for token in held]
            if taken.isdisjoint(inputs) and (found := _layer(path, held, outs, by_name)):
                layers.setdefault(frozenset(found), found)
                taken.update(inputs)
    return _unshared(layers.values())


def _layer(
    path: str, held: Mapping[str, str], outs: Sequence[str], by_name: Mapping[str, Spec]
) -> dict[str, Attention] | None:
    """The places of one layer's tensors, or ``None`` where names or shapes do not make one."""
    found = {token: by_name.get(join(path, _leaf(token))) for token in held}
    above = path.rpartition(".")[0]
    candidates = [join(above if o.startswith("^") else path, _leaf(o.removeprefix("^"))) for o in outs]
    out = next((by_name[n] for n in candidates if n in by_name), None)
    inputs = {token: s for token, s in found.items() if s is not None and _can(s)}
    if out is None or not _can(out) or len(inputs) < len(held):
        return None
    names = (*(s.name for s in inputs.values()), out.name)
    outputs = out.shape[out.in_dim or 0]
    sizes = {token: _sizes(held[token], s.shape[s.out_dim or 0], outputs) for token, s in inputs.items()}
    features = {what: size for parts in sizes.values() for what, size in parts.items()}
    if len(set(names)) < len(names) or len(features) < 3:
        return None
    layer = _above(names)
    whole = (features["q"], features["k"], features["v"], outputs)
    places = {out.name: Attention(layer, names, out.in_dim or 0, (outputs,), *whole)}
    for token, s in inputs.items():
        parts = tuple(sizes[token].values())
        sections = (sum(parts),) if held[token] == "heads" else parts
        biases = tuple(Member(b, sections) for b in (s.bias, *s.more_biases) if b) + _packed(
            path, token, outputs, by_name
        )
        places[s.name] = Attention(layer, names, s.out_dim or 0, sections, *whole, biases)
    return places


def _leaf(token: str) -> str:
    return token if token.endswith("_weight") else f"{token}.weight"


def _can(spec: Spec) -> bool:
    return spec.role in ROLES and spec.out_dim is not None and spec.in_dim is not None


def _sizes(what: str, rows: int, outputs: int) -> dict[str, int]:
    """Features of what a projection of so many rows holds; nothing where they cannot be.

    >>> _sizes("q", 8, 8), _sizes("qkv", 16, 8), _sizes("kv", 7, 8)
    ({'q': 8}, {'q': 8, 'k': 4, 'v': 4}, {})
    """
    if len(what) == 1:
        return {what: rows}
    both, odd = divmod(rows if what == "kv" else rows - outputs, 2)
    if odd or both < 1:
        return {}
    return {"k": both, "v": both} if what == "kv" else {"q": outputs, "k": both, "v": both}


def _packed(path: str, token: str, features: int, by_name: Mapping[str, Spec]) -> tuple[Member, ...]:
    """Biases of `torch.nn.MultiheadAttention` that are no single projection's."""
    if not token.endswith("_weight") or token[0] not in "iq":
        return ()
    found: dict[str, tuple[int, ...]] = {"bias_k": (features,), "bias_v": (features,)}
    if token[0] == "q":
        found["in_proj_bias"] = (features,) * 3
    names = {join(path, leaf): sections for leaf, sections in found.items()}
    return tuple(Member(by_name[n].name, sections) for n, sections in names.items() if n in by_name)


def _above(names: Sequence[str]) -> str:
    """The innermost module that holds all of these tensors.

    >>> _above(["layer.0.attention.self.query.weight", "layer.0.attention.output.dense.weight"])
    'layer.0.attention'
    """
    shared = []
    for steps in zip(*(n.split(".")[:-1] for n in names), strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared) or "attention"


def _unshared(layers: Iterable[dict[str, Attention]]) -> dict[str, Attention]:
    """The places of all layers, without those that have a tensor or the name in common with another."""
    layers = list(layers)
    tensors = Counter(name for layer in layers for name in layer)
    called = Counter(next(iter(layer.values())).layer for layer in layers)
    return {
        name: place
        for layer in layers
        if all(tensors[n] == 1 and called[p.layer] == 1 for n, p in layer.items())
        for name, place in layer.items()
    }
