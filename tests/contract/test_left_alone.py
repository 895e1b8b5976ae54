"""Promise 4: names, shapes, dtypes, keys, hooks, buffers, storage and references are as before; only zeros are new."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.contract.nets import BIASES, CHOSEN, Net, bits, is_zero, net, outside, snapshot, tensors
from tests.contract.table import DEFINED, PLAIN, Case, default_of, expected_warnings, ids

ONE_OF_EACH = [c for c in PLAIN if c.allocation == default_of(c.pattern) and c.criterion in ("magnitude", "function")]


def prune(model: nn.Module, case: Case) -> secateur.Report:
    with expected_warnings():
        return secateur.prune(model, **case.asked())


def busy(dtype: str = "float32") -> Net:
    """A model in the middle of its life: gradients, hooks, a frozen parameter, a module in eval mode."""
    model = net(dtype, "ties")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.fc1.weight.requires_grad_(False)
    model.norm.eval()
    model.conv.register_forward_hook(lambda module, args, output: None)
    model.fc2.register_forward_pre_hook(lambda module, args: None)
    model.fc2.weight.register_hook(lambda grad: None)
    return model


@pytest.mark.parametrize("case", DEFINED[::6] + ONE_OF_EACH, ids=ids(DEFINED))
def test_nothing_but_values_changes(case: Case) -> None:
    model = busy()
    before, dense = outside(model), tensors(model)
    prune(model, case)
    assert outside(model) == before
    for name, t in model.state_dict().items():
        changed = bits(t) != bits(dense[name])
        may_change = name in CHOSEN or (case.pattern == "channel" and name in BIASES.values())
        assert may_change or not changed, name
        left = ~is_zero(t)
        assert torch.equal(t[left], dense[name][left]), name
    assert any(bits(model.state_dict()[n]) != bits(dense[n]) for n in CHOSEN)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "mixed"])
def test_copies_and_states(case: Case, dtype: str) -> None:
    model = net(dtype, "ties")
    prune(model, case)
    want = snapshot(model)

    fresh = net(dtype, "ties", seed=1)
    assert snapshot(fresh) != want
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert snapshot(fresh) == want
    assert snapshot(copy.deepcopy(model)) == want
    if dtype in ("float32", "bfloat16"):  # plain pickle of 8-bit floats fails inside torch
        assert snapshot(pickle.loads(pickle.dumps(model))) == want
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert snapshot(torch.load(file, weights_only=False)) == want
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert snapshot(torch.load(file, weights_only=True)) == want

    dense = net(dtype, "ties", seed=1)
    model.load_state_dict(dense.state_dict(), strict=True)
    assert snapshot(model) == snapshot(dense)


def test_graphs_are_copied_after_a_forward_too() -> None:
    model = net()
    model(torch.randn(2, 4, 3, 3)).sum()
    secateur.prune(model, 0.5)
    assert snapshot(copy.deepcopy(model)) == snapshot(model)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_the_optimizer_goes_on_with_the_same_parameters(case: Case) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(3, 4, 3, 3)
    model(x).sum().backward()
    optimizer.step()
    momentum = [bits(s["momentum_buffer"]) for s in optimizer.state.values()]
    prune(model, case)
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert [bits(s["momentum_buffer"]) for s in optimizer.state.values()] == momentum
    pruned = snapshot(model)
    model(x).sum().backward()
    optimizer.step()
    assert snapshot(model) != pruned


def test_hooks_still_run() -> None:
    model, seen = net(), []
    model.conv.register_forward_hook(lambda module, args, output: seen.append("forward"))
    model.fc2.weight.register_hook(lambda grad: seen.append("gradient"))
    secateur.prune(model, 0.5)
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    assert seen == ["forward", "gradient"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
def test_a_compiled_model_sees_the_zeros(pattern: str) -> None:
    """Compiled before or after: full graph, no stale weights."""
    torch._dynamo.reset()
    model, x = net().eval(), torch.randn(2, 4, 3, 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    dense = compiled(x)
    case = Case(pattern, default_of(pattern), "magnitude")
    with expected_warnings():
        secateur.prune(compiled, **case.asked())
    assert not torch.allclose(compiled(x), dense)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    again = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_export() -> None:
    model, x = net().eval(), torch.randn(2, 4, 3, 3)
    secateur.prune(model, 0.5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)
    assert {n: bits(t) for n, t in program.state_dict.items()} == snapshot(model)


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    model: nn.Module = BertForMaskedLM(config)
    return model.eval()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
def test_save_pretrained(pattern: str, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    model = tiny_bert()
    head: Any = model
    with expected_warnings():
        report = secateur.prune(model, 0.5, pattern=pattern)
    assert report.total == 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 16  # the layers and the head's transform
    tied = report["bert.embeddings.word_embeddings.weight"]
    assert "cls.predictions.decoder.weight" in tied.aliases
    assert tied.skip is not None
    head.save_pretrained(tmp_path)
    loaded: Any = BertForMaskedLM.from_pretrained(tmp_path)
    assert snapshot(loaded) == snapshot(model)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, head(tokens).logits, rtol=0, atol=0)


def test_a_graph_in_flight_is_told() -> None:
    """Gradients of a forward pass from before would be those of other weights: torch says so."""
    model = net()
    loss = model(torch.randn(2, 4, 3, 3)).sum()
    secateur.prune(model, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_grad_mode_are_no_hindrance() -> None:
    want = net()
    secateur.prune(want, 0.5)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        model = net()
        with mode():
            secateur.prune(model, 0.5)
        assert snapshot(model) == snapshot(want)
        assert not any(p.is_inference() for p in model.parameters())
    assert torch.is_grad_enabled()


def test_views_of_one_flat_tensor_are_pruned_where_they_lie() -> None:
    flat = torch.randn(96, generator=torch.Generator().manual_seed(0))
    dense = flat.clone()
    target: dict[str, Tensor] = {"a.weight": flat[:48].view(6, 8), "b.weight": flat[48:].view(8, 6)}
    secateur.prune(target, 0.5)
    assert int(is_zero(flat).sum()) == 48
    assert torch.equal(flat[~is_zero(flat)], dense[~is_zero(flat)])
