"""Which tensors are one layer of attention, what `Head` asks of their shapes, and who is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.allocate import pick
from secateur.core.heads import Head, Slices, joined
from secateur.core.spelling import pattern_of
from secateur.core.types import Attention, Member, Spec, units_along
from secateur.errors import BadInput, NotDefined, NothingChosen, PlanMismatch
from secateur.stores.base import matches
from secateur.stores.memory import MemoryStore


def placed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Attention]:
    """The places of a dict's tensors."""
    state = {n: torch.arange(1.0, 1 + torch.Size(s).numel()).view(s) for n, s in shapes.items()}
    return {s.name: s.attention for s in MemoryStore(state).specs() if s.attention is not None}


def layer(path: str, names: str, shape: tuple[int, int] = (8, 8)) -> dict[str, tuple[int, ...]]:
    return {f"{path}{n}.weight": shape for n in names.split()}


FOUND = {
    "llama": layer("h.0.self_attn.", "q_proj k_proj v_proj o_proj"),
    "opt": layer("h.0.self_attn.", "q_proj k_proj v_proj out_proj"),
    "bert": layer("h.0.attention.", "self.query self.key self.value output.dense"),
    "albert": layer("h.0.attention.", "query key value dense"),
    "t5": layer("h.0.SelfAttention.", "q k v o"),
    "diffusers": layer("h.0.attn1.", "to_q to_k to_v to_out.0"),
    "distilbert": layer("h.0.attention.", "q_lin k_lin v_lin out_lin"),
    "as published": layer("h.0.attention.", "wq wk wv wo"),
}


LAYER = {"llama": "h.0.self_attn", "opt": "h.0.self_attn", "t5": "h.0.SelfAttention", "diffusers": "h.0.attn1"}


@pytest.mark.parametrize("name", FOUND)
def test_projections_that_lie_apart(name: str) -> None:
    found = placed({**FOUND[name], "h.0.mlp.fc1.weight": (16, 8), "h.0.norm.weight": (8,)})
    q, k, v, o = FOUND[name]
    assert set(found) == {q, k, v, o}
    assert {p.layer for p in found.values()} == {LAYER.get(name, "h.0.attention")}
    assert [found[n].dim for n in (q, k, v, o)] == [0, 0, 0, 1]
    assert all(p.tensors == (q, k, v, o) and p.sections == (8,) for p in found.values())


PACKED: dict[str, tuple[dict[str, tuple[int, ...]], int, tuple[int, ...]]] = {
    "gpt2": ({"attn.c_attn.weight": (8, 24), "attn.c_attn.bias": (24,), "attn.c_proj.weight": (8, 8)}, 1, (8, 8, 8)),
    "nanogpt": ({"attn.c_attn.weight": (24, 8), "attn.c_attn.bias": (24,), "attn.c_proj.weight": (8, 8)}, 0, (8, 8, 8)),
    "timm": ({"attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8)}, 0, (8, 8, 8)),
    "phi3": ({"attn.qkv_proj.weight": (16, 8), "attn.o_proj.weight": (8, 8)}, 0, (8, 4, 4)),
    "neox": ({"attn.query_key_value.weight": (24, 8), "attn.dense.weight": (8, 8)}, 0, (24,)),
    "torch": ({"attn.in_proj_weight": (24, 8), "attn.out_proj.weight": (8, 8)}, 0, (8, 8, 8)),
}


@pytest.mark.parametrize("name", PACKED)
def test_projections_that_are_packed(name: str) -> None:
    shapes, dim, sections = PACKED[name]
    found = placed(shapes)
    first = next(iter(shapes))
    assert (found[first].layer, found[first].dim, found[first].sections) == ("attn", dim, sections)
    out = next(p for n, p in found.items() if n != first)
    assert out.sections == (8,) and out.queries == 8
    assert list(found[first].followers) == (
        [Member("attn.c_attn.bias", (8, 8, 8))] if "attn.c_attn.bias" in shapes else []
    )


def test_cross_attention_of_gpt2() -> None:
    found = placed(
        {"x.q_attn.weight": (8, 8), "x.c_attn.weight": (8, 16), "x.c_attn.bias": (16,), "x.c_proj.weight": (8, 8)}
    )
    assert found["x.q_attn.weight"].sections == (8,) and found["x.c_attn.weight"].sections == (8, 8)


NOT_FOUND = {
    "no output": layer("h.attn.", "q_proj k_proj v_proj"),
    "no values": layer("h.attn.", "q_proj k_proj o_proj"),
    "elsewhere": {**layer("h.attn.", "q_proj k_proj v_proj"), **layer("h.mlp.", "o_proj")},
    "too few rows": {"attn.qkv.weight": (8, 8), "attn.proj.weight": (8, 8)},
    "an odd rest": {"attn.qkv.weight": (17, 8), "attn.proj.weight": (8, 8)},
    "convolutions": {f"attn.{n}.weight": (8, 8, 1, 1) for n in ("q_proj", "k_proj", "v_proj", "o_proj")},
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_layer_of_attention(name: str) -> None:
    assert placed(NOT_FOUND[name]) == {}
    state = {n: torch.ones(s) for n, s in NOT_FOUND[name].items()}
    with pytest.raises(
        NothingChosen, match=r"head:2: no layer of attention was found.*q_proj, k_proj, v_proj and o_proj"
    ):
        secateur.prune(state, 0.5, pattern="head:2")
    assert all(bool((t == 1).all()) for t in state.values())


def test_renamed_tensors_are_pruned_in_place() -> None:
    """What the refusal advises."""
    model = nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in ("ask", "look", "tell", "merge")})
    names = dict(zip(model, ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"), strict=True))
    secateur.prune({f"{names[n]}.weight": m.weight.data for n, m in model.items()}, 0.5, pattern="head:2")
    assert [int((m.weight == 0).sum()) for m in model.values()] == [32, 32, 32, 32]


class Shared(nn.Module):
    def __init__(self, *shared: str) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.a = nn.ModuleDict({n: nn.Linear(8, 8) for n in names})
        self.b = nn.ModuleDict({n: nn.Linear(8, 8) for n in names})
        for n in shared:
            self.b[n].weight = self.a[n].weight


def test_layers_that_share_all_are_one_and_those_that_share_some_are_none() -> None:
    def found(model: nn.Module) -> dict[str, Attention]:
        return {s.name: s.attention for s in MemoryStore(model).specs() if s.attention is not None}

    apart, one, none = found(Shared()), found(Shared("q_proj", "k_proj", "v_proj", "o_proj")), found(Shared("q_proj"))
    assert len(apart) == 8 and len({p.layer for p in apart.values()}) == 2
    assert {p.layer for p in one.values()} == {"a"} and len(one) == 4
    assert [m.name for m in one["a.q_proj.weight"].followers] == ["a.q_proj.bias", "b.q_proj.bias"]
    assert none == {}
    model = Shared("q_proj", "k_proj", "v_proj", "o_proj")
    secateur.prune(model, 0.5, pattern="head:2")
    dead = (model.a["q_proj"].weight == 0).all(1)
    assert (
        int(dead.sum()) == 4
        and torch.equal(model.b["q_proj"].bias == 0, dead)
        and torch.equal(model.a["q_proj"].bias == 0, dead)
    )


def test_queries_and_keys_that_are_one_tensor() -> None:
    model = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model["k_proj"].weight = model["q_proj"].weight
    assert all(s.attention is None for s in MemoryStore(model).specs())


def spec_of(queries: int, keys: int, values: int, outputs: int, **more: Any) -> Spec:
    place = Attention("attn", ("q", "k", "v", "o"), 0, (queries,), queries, keys, values, outputs)
    return Spec("q", (queries, 6), torch.float32, "linear", 0, 1, attention=place, **more)


WHO = [
    ((12, 12, 12, 12), 4, 4),
    ((12, 6, 6, 12), 4, 2),
    ((12, 3, 3, 12), 4, 1),
    ((12, 12, 12, 12), 12, 12),
    ((8, 8, 12, 12), 4, 4),  # queries and keys of another width than values
    ((8, 4, 6, 12), 4, 2),
    ((12, 12, 12, 12), 5, "do not divide into 5 heads"),
    ((12, 12, 12, 12), 24, "do not divide into 24 heads"),
    ((12, 4, 4, 12), 4, "no whole share of 4 heads of 3"),
    ((12, 9, 9, 12), 4, "no whole share of 4 heads of 3"),
    ((24, 12, 12, 12), 4, "24 features of queries and 12 of keys"),
    ((10, 10, 12, 12), 4, "10 features of queries and 10 of keys"),
    ((0, 0, 0, 0), 4, "do not divide"),
    ((8, 8, 0, 8), 4, "no whole share"),
]


@pytest.mark.parametrize(("sizes", "n", "answer"), WHO)
def test_who_can_carry_heads(sizes: tuple[int, int, int, int], n: int, answer: int | str) -> None:
    spec = spec_of(*sizes)
    why = Head(n).why_not(spec)
    if isinstance(answer, str):
        assert answer in str(why)
    else:
        assert why is None and Head(n).grid(spec).units == answer


def test_heads_of_what_is_no_attention() -> None:
    bare = Spec("w", (8, 8), torch.float32, "linear", 0, 1)
    assert "no projection of a layer of attention" in str(Head(4).why_not(bare))
    state = {**{n: torch.ones(s) for n, s in FOUND["llama"].items()}, "fc.weight": torch.ones(8, 8)}
    with pytest.raises(
        NotDefined, match=r"'fc\.weight' .* cannot be pruned in the pattern head:2: it is no projection"
    ):
        secateur.prune(state, 0.5, pattern="head:2", include=["fc.weight", "h.*"])
    secateur.prune(state, 0.5, pattern="head:2")  # and what lies outside is no news
    assert bool((state["fc.weight"] == 1).all())


def test_a_wrong_number_of_heads_is_refused() -> None:
    state = {n: torch.ones(s) for n, s in FOUND["llama"].items()}
    with pytest.raises(NothingChosen, match=r"the 8 features of 'h\.0\.self_attn' do not divide into 3 heads"):
        secateur.prune(state, 0.5, pattern="head:3")
    with pytest.raises(NotDefined, match=r"the 8 features"):
        secateur.prune(state, 0.5, pattern="head:3", include=list(state))
    both = state | {n.replace("h.0", "h.1"): torch.ones(12, 12) for n in state}
    with pytest.warns(secateur.SecateurWarning, match=r"4 tensors cannot carry head:3 and stay dense"):
        report = secateur.prune(both, 0.5, pattern="head:3", allocation="uniform")
    assert report.total == 4 * 144


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "4", None])
def test_what_makes_no_head(n: Any) -> None:
    with pytest.raises(BadInput, match="number of heads"):
        Head(n)


def test_short_forms() -> None:
    assert (
        pattern_of("head:12") == pattern_of(" Head:12 ") == Head(12) == pattern_of(Head(12))
        and str(Head(12)) == "head:12"
    )
    for text in ("head", "head:", "head:0", "heads:4", "head:4:8", "head:x"):
        with pytest.raises(BadInput):
            pattern_of(text)
    with pytest.raises(BadInput, match="mean, l1, l2, max"):
        Head(4, "sum")  # type: ignore[arg-type]


def test_slices() -> None:
    grid = Slices((2, 6), 1, (4, 2), 2)
    assert grid.unit_size == 6
    assert grid.unit_of(torch.arange(12)).tolist() == [0, 0, 1, 1, 0, 1] * 2
    assert units_along((3, 3), 3).tolist() == [0, 1, 2, 0, 1, 2]
    assert Member("b").units(3).tolist() == [0, 1, 2] and Member("b").numel(3) == 3
    assert Member("b", (2, 4)).units(2).tolist() == [0, 1, 0, 0, 1, 1] and Member("b", (2, 4)).numel(2) == 6


def test_a_layer_goes_by_any_of_its_names() -> None:
    specs = [s for s in MemoryStore({n: torch.ones(s) for n, s in FOUND["bert"].items()}).specs() if s.attention]
    (one,) = joined(specs, Head(2))
    assert (
        one.shape == (2, 128)
        and one.members == tuple(specs)
        and one.numel == 256
        and joined(specs, pattern_of("2x2")) == specs
    )
    assert pick({"h.0": 0.5}, one, matches, "x") == pick({specs[0].name: 0.5}, one, matches, "x") == 0.5
    with pytest.raises(BadInput, match=r"x is ambiguous for 'h\.0\.attention'"):
        pick({specs[0].name: 0.5, specs[1].name: 0.25}, one, matches, "x")


def plan() -> secateur.Plan:
    state = {n: torch.arange(1.0, 65).view(8, 8) for n in FOUND["llama"]}
    return secateur.plan(state, 0.5, pattern="head:4")


SPOILED: list[tuple[str, Any]] = [
    *(("units", value) for value in (None, [0, 4], [1, 0], [0, 0], [-1], [True], ["0"], [3])),
    *(("attention.dim", value) for value in (2, "0", True)),
    *(("attention.sections", value) for value in ([4], [5, 3], [8.0], [])),
    *(("attention.tensors", value) for value in (["other"], [1])),
    ("attention", None),
    ("attention.outputs", -8),
    ("attention.outputs", 0),
    ("attention.values", 5),
    ("attention.keys", "8"),
    ("attention.layer", 3),
    ("attention.followers", [{"name": "x", "sections": []}]),
    ("attention.more", 1),
]


@pytest.mark.parametrize(("where", "value"), SPOILED, ids=lambda v: str(v)[:40])
def test_plans_that_no_plan_writes_are_refused(where: str, value: Any) -> None:
    head = json.loads(plan().to_json())
    assert secateur.Plan.from_json(json.dumps(head)) == plan()
    row = head["rows"][0]
    *above, last = where.split(".")
    (row[above[0]] if above else row)[last] = value
    with pytest.raises(BadInput):
        secateur.Plan.from_json(json.dumps(head))


def test_rows_of_other_patterns_say_nothing_of_heads() -> None:
    state = {n: torch.arange(1.0, 65).view(8, 8) for n in FOUND["llama"]}
    rows = json.loads(secateur.plan(state, 0.5, pattern="channel").to_json())["rows"]
    assert all("attention" not in r and "units" not in r for r in rows)


def test_a_plan_is_refused_by_another_target() -> None:
    made = plan()
    state: dict[str, Tensor] = {n: torch.arange(1.0, 65).view(8, 8) for n in FOUND["llama"]}
    state[made.rows[0].name][7, 7] = 0  # one zero more than the plan counted
    with pytest.raises(PlanMismatch, match="its values are not those the plan was made from"):
        secateur.apply(made, state)
    state[made.rows[0].name][7, 7] = torch.nan
    with pytest.raises(secateur.BadTensor, match="NaN or infinite"):
        secateur.apply(made, state)
    del state[made.rows[1].name]
    with pytest.raises(PlanMismatch, match="no such tensor"):
        secateur.apply(made, state)


def test_a_mask_of_any_piece_comes_from_the_plan_alone() -> None:
    from secateur.core.plan import keep_mask
    from secateur.core.types import Part

    made = plan()
    row = made.rows[0]
    whole = keep_mask(made, Part(row.spec, torch.ones(8, 8)))
    assert torch.equal(keep_mask(made, Part(row.spec, torch.ones(3, 8), 16)), whole[2:5])
    assert int((~whole).sum()) == row.prune
