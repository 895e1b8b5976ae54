"""Adapters over pruned weights: merging them brings pruned weights back, and masks from before take those out again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import BadInput, Pruner, SecateurWarning, schedules
from secateur.stores.memory import MemoryStore


class LoRA(nn.Module):
    """A hand-written adapter, its factors under names of their own or LoRA's."""

    def __init__(self, base: nn.Linear, telling: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        down, up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(up.weight)
        self.names = ("lora_A", "lora_B") if telling else ("down", "up")
        for name, factor in zip(self.names, (down, up), strict=True):
            self.add_module(name, factor)

    def factors(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.factors()
        out: Tensor = self.base(x) + up(down(x))
        return out

    def merge(self) -> nn.Linear:
        down, up = self.factors()
        with torch.no_grad():
            self.base.weight += up.weight @ down.weight
        return self.base


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    secateur.prune(model, 0.75)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.randn(16, 8)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("telling", [True, False])
def test_a_masked_merge(telling: bool) -> None:
    model = pruned()
    masks = secateur.masks(model)
    live = {n: model.get_parameter(n).detach().clone() for n in masks}
    for i in (0, 2):
        model[i] = LoRA(model[i], telling)  # type: ignore[arg-type]
    train(model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1))
    for i in (0, 2):
        model[i] = model[i].merge()
    assert secateur.inspect(model).sparsity == 0
    merged = {n: model.get_parameter(n).detach().clone() for n in masks}
    assert secateur.apply(masks, model).sparsity == 0.75
    for n, mask in masks.items():
        assert torch.equal(model.get_parameter(n), merged[n].masked_fill(~mask, 0))
        assert not torch.equal(merged[n][mask], live[n][mask])


@pytest.mark.parametrize("schedule", [None, schedules.constant(0.9)])
def test_a_pruner_over_frozen_weights_says_what_to_do(schedule: schedules.Schedule | None) -> None:
    model = pruned()
    for i in (0, 2):
        model[i] = LoRA(model[i], telling=True)  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match=r"is frozen.*\(0\.base\.weight, 2\.base\.weight\).*secateur\.apply\(masks, model\)"
    ):
        Pruner(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), schedule)


def test_a_pruner_that_would_hold_nothing_warns() -> None:
    model = pruned()
    model[0] = LoRA(model[0], telling=False)  # type: ignore[arg-type]
    nn.init.normal_(model[2].weight)  # type: ignore[arg-type]
    with pytest.warns(SecateurWarning, match=r"holds nothing.*\(0\.base\.weight\).*after the merge"):
        Pruner(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    secateur.prune(model, 0.5, include="2.weight")
    pruner = Pruner(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    assert pruner.masks()["2.weight"].sum() == 64


def test_factors_are_pruned_where_they_are_named_in_full() -> None:
    model = nn.Sequential(LoRA(nn.Linear(8, 8), telling=True))
    assert [r.name for r in secateur.plan(model, 0.5).chosen] == ["0.base.weight"]
    of_dict = {r.name: r.skip for r in secateur.plan(dict(model.state_dict()), 0.5).rows}
    assert of_dict["0.lora_A.weight"] == of_dict["0.lora_B.weight"] == "a factor of an adapter"
    report = secateur.prune(model, 0.5, include="0.lora_A.weight")
    assert report.zeros == 8


def language_model(kind: str) -> tuple[Any, list[str]]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2, **ends)), [
            "c_attn"
        ]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)), ["q_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_merges_under_masks_taken_before_or_with_the_adapters(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    model, targets = language_model(kind)
    secateur.prune(model, 0.5)
    before = secateur.masks(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM"))
    masks = secateur.masks(adapted)
    assert masks.keys() == before.keys() and all(torch.equal(masks[n], before[n]) for n in masks)
    as_dict = {s.name: (s.role, s.skip) for s in MemoryStore(dict(adapted.state_dict())).specs()}
    for s in MemoryStore(adapted).specs():
        assert as_dict[s.name] == (s.role, s.skip)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.1)
    with pytest.raises(BadInput, match=r"secateur\.apply\(masks, model\) after the merge"):
        Pruner(adapted, optimizer)
    tokens = torch.randint(0, 40, (4, 8))
    for _ in range(4):
        optimizer.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    merged = adapted.merge_and_unload()
    assert secateur.inspect(merged).sparsity < 0.45
    assert secateur.apply(masks, merged).sparsity == 0.5
