"""FLOPs of whole networks, weights that are not used as they are stored, and what a count gives back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from secateur.errors import BadInput
from secateur.evaluate.flops import Flops, count_flops

from .test_flops import Calls, zero_half

# --- real architectures
# -----------------------------------------------------------------------------------------------


def bert(**kwargs: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    size = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 20}
    return BertModel(BertConfig(**size, num_hidden_layers=2, num_attention_heads=2, **kwargs))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert(attention: str) -> None:
    model, ids = bert(attn_implementation=attention), torch.randint(0, 50, (3, 7))
    flops = count_flops(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    rows, scores = 21, 3 * 7 * 7
    layer = rows * (4 * 16 * 16 + 2 * 16 * 32) + 2 * scores * 16
    assert flops.macs == 2 * layer + 3 * 16 * 16  # the pooler sees one token a sequence
    assert flops.by_module["pooler.dense"] == 2 * 3 * 16 * 16
    assert flops.by_module["encoder.layer.1.attention.self.query"] == 2 * rows * 16 * 16
    assert flops.by_module["encoder.layer.1.attention.self"] == 2 * 2 * scores * 16


def test_gpt2_with_its_tied_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20))
    assert model.lm_head.weight is model.transformer.wte.weight
    flops = count_flops(model, torch.randint(0, 50, (3, 7)))
    rows, scores = 21, 3 * 7 * 7
    assert flops.macs == 2 * (rows * 12 * 16 * 16 + 2 * scores * 16) + rows * 16 * 50
    assert flops.by_module["lm_head"] == 2 * rows * 16 * 50  # not the embedding's: a lookup multiplies nothing
    assert flops.by_module["transformer.h.0.attn.c_attn"] == 2 * rows * 16 * 48
    assert "transformer.wte" not in flops.by_module
    zero_half(model.transformer.h[0].mlp.c_fc.weight)
    zero_half(model.lm_head.weight)
    left = count_flops(model, torch.randint(0, 50, (3, 7))).effective
    assert left == flops.total - rows * 16 * 64 - rows * 16 * 50


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_experts(experts: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    size = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": experts}
    model = MixtralForCausalLM(MixtralConfig(**size, **heads, **moe)).eval()
    ids = torch.randint(0, 50, (3, 7))
    flops = count_flops(model, ids)
    rows = 21
    attention = rows * 16 * (16 + 8 + 8 + 16) + 2 * 3 * 7 * 7 * 16
    router = rows * 16 * 4
    expert = rows * 2 * (16 * 64 + 32 * 16)
    assert flops.macs == attention + router + expert + rows * 16 * 50
    assert flops.by_module["model.layers.0.mlp.experts"] == 2 * expert

    layer = model.model.layers[0].mlp
    chosen: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda m, args: chosen.append(args[1]))
    layer.experts.down_proj.data[2] = 0
    left = count_flops(model, ids).effective
    assert left == flops.total - 2 * int((chosen[0] == 2).sum()) * 32 * 16


# --- weights that are not used as they are stored
# ---------------------------------------------------------------------


def half(flops: Flops) -> bool:
    return flops.effective * 2 == flops.total


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 4))
    for w in model.parameters():
        zero_half(w)
    with torch.autocast("cpu", torch.bfloat16):
        assert half(count_flops(model, torch.randn(3, 2, 8)))


def test_torch_prune() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.l1_unstructured(model[1], name, 0.5)
    flops = count_flops(model, torch.randn(3, 2, 8))
    assert half(flops)
    assert set(flops.by_module) == {"0", "1"}


def test_torch_prune_whose_hook_never_runs() -> None:
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    prune.l1_unstructured(layer.out_proj, "weight", 0.5)
    flops = count_flops(layer, (x, x, x))
    assert flops.effective == flops.total - 15 * 64


PARAMETRIZED = [
    (parametrizations.weight_norm, 0, 0.5),
    (parametrizations.spectral_norm, 2 * 36, 0.5),
    (parametrizations.orthogonal, 2 * 216, 1.0),  # a product that fills the zeros in
]


@pytest.mark.parametrize(("make", "making", "density"), PARAMETRIZED, ids=lambda v: getattr(v, "__name__", ""))
def test_parametrised(make: Callable[[nn.Module], nn.Module], making: int, density: float) -> None:
    """The weight is recognised in what is computed from it, and products that compute it count as well."""
    layer = make(nn.Linear(6, 6))
    with torch.no_grad():
        for p in layer.parameters():
            if p.shape == (6, 6):
                p[:, :3] = 0
    flops = count_flops(nn.Sequential(layer), torch.randn(1000, 6))
    assert flops.by_module == {"0": 2 * 1000 * 36 + making}
    assert abs(flops.effective - density * 2 * 1000 * 36) <= making


def test_masked_in_forward() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask)

    flops = count_flops(Masked(), torch.randn(3, 4))
    assert flops.effective * 4 == flops.total


def test_weights_in_one_storage_are_told_apart() -> None:
    """As after `flatten_parameters` on a GPU."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    flat = torch.randn(32)
    flat[:8] = 0
    for layer, piece in zip(model, flat.view(2, 4, 4), strict=True):
        layer.weight = nn.Parameter(piece)
    assert count_flops(model, torch.randn(1, 4)) == Flops(64, {"0": 32, "1": 32}, 48)


def test_an_unused_weight_in_the_storage_of_a_used_one() -> None:
    used, spare = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    used.weight, spare.weight = (nn.Parameter(piece) for piece in torch.randn(2, 4, 4))
    with pytest.raises(BadInput, match="'spare'"):
        count_flops(Calls(lambda x, used, spare: used(x), used=used, spare=spare), torch.randn(1, 4))


def test_products_of_activations_belong_to_no_weight() -> None:
    """Rows of an embedding, and memory made like a weight's with an activation in it, are activations."""
    table = nn.Embedding(6, 4)
    zero_half(table.weight)
    towers = Calls(lambda a, b, table: table(a) @ table(b).t(), table=table)
    ids = torch.tensor([0, 1])
    assert count_flops(towers, (ids, ids)) == Flops(32, {"": 32}, 32)

    def forward(x: Tensor, fc: nn.Module) -> Tensor:
        y = fc.weight.new_zeros(3, 4)
        y.copy_(fc(x))
        return y @ y.t()

    assert count_flops(Calls(forward, fc=nn.Linear(4, 4)), torch.randn(3, 4)).by_module == {"": 72, "fc": 96}


def test_learned_queries() -> None:
    """They do not depend on the input, like weights; what a layer makes of them is an activation all the same."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Embedding(2, 4)
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(self.latents.weight) @ self.key(x).t()

    model = Queries()
    zero_half(model.latents.weight)
    assert count_flops(model, torch.randn(3, 4)) == Flops(208, {"": 48, "query": 64, "key": 96}, 208)


def test_weights_used_in_inference_mode() -> None:
    model = nn.Sequential(nn.LSTM(4, 4, batch_first=True), Calls(lambda out: out[0]), nn.Linear(4, 4))
    x = torch.randn(2, 3, 4)
    expected = count_flops(model, x)
    with torch.inference_mode():
        assert count_flops(model, x) == expected
    attention = Calls(F.scaled_dot_product_attention)
    q = {n: torch.randn(2, 4, 5, 8) for n in ("query", "key", "value")}
    with torch.inference_mode():
        assert count_flops(attention, q).macs == 2 * 4 * 5 * 5 * 16


def test_compiled_runs_as_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 4))
    x = torch.randn(3, 2, 4)
    expected = count_flops(model, x)
    for compiled in (
        torch.compile(model, backend="eager"),
        nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
    ):
        compiled(x)
        assert count_flops(compiled, x) == expected
    model[0].compile(backend="eager")
    assert count_flops(model, x) == expected


# --- the result
# -------------------------------------------------------------------------------------------------------


def test_speedup_and_its_edges() -> None:
    assert Flops(100, {"": 100}, 40).speedup == 2.5
    assert Flops(0, {}, 0).speedup == 1.0
    assert Flops(100, {"": 100}, 0).speedup == float("inf")
    assert json.loads(Flops(100, {"": 100}, 0).to_json())["speedup"] is None
    assert count_flops(nn.ReLU(), torch.zeros(2)) == Flops(0, {}, 0)


def test_nan_weights_are_not_zero() -> None:
    model = nn.Linear(4, 4)
    model.weight.data[:] = float("nan")
    assert count_flops(model, torch.zeros(1, 4)).speedup == 1.0


def test_as_text_and_json() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    zero_half(model[0].weight)
    flops = count_flops(model, torch.zeros(1, 1000))
    assert str(flops).splitlines() == [
        "2.02 MFLOPs = 1.01 M multiply-adds at 2 FLOPs each",
        "1.02 MFLOPs with nonzero weights: 1.98x speed-up in theory, not a measurement",
        "0     2.00 M   99.0%",
        "1    20.00 k    1.0%",
    ]
    data = json.loads(flops.to_json())
    assert (data["total"], data["macs"], data["effective"]) == (2_020_000, 1_010_000, 1_020_000)
    assert data["by_module"] == {"0": 2_000_000, "1": 20_000}
    assert data["by_weight"] == {"0.weight": 2_000_000, "1.weight": 20_000}
    assert "2 per multiply-add" in data["convention"]
    with pytest.raises(FrozenInstanceError):
        flops.total = 1  # type: ignore[misc]


def test_flops_by_weight_are_what_its_zeros_save() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.out.weight = self.emb.weight
            self.q, self.k, self.attention = (
                nn.Linear(8, 8),
                nn.Linear(8, 4),
                nn.MultiheadAttention(8, 2, batch_first=True),
            )

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.emb(tokens)
            h = F.linear(h, torch.cat([self.q.weight, self.k.weight]))[..., :8]  # one product of two weights
            out: Tensor = self.out(self.attention(h, h, h)[0])
            return out

    model, tokens = Net(), torch.tensor([[1, 2, 3]])
    flops = count_flops(model, tokens)
    assert flops.by_weight == {
        "emb.weight": 480, "q.weight": 384, "k.weight": 192, "attention.in_proj_weight": 1152, "attention.out_proj.weight": 384,
    }  # fmt: skip
    assert (
        flops.total - sum(flops.by_weight.values()) == 2 * 2 * 3 * 3 * 8
    )  # the scores, and their product with the values
    for name in ("emb.weight", "attention.in_proj_weight", "attention.out_proj.weight"):
        weight = model.get_parameter(name)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            assert flops.total - count_flops(model, tokens).effective == flops.by_weight[name]
            weight.copy_(kept)
