"""Promise 4 in the middle of a training: with a Pruner at work, a model is still the model it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from secateur import Pruner, dynamic, schedules
from tests.contract.nets import snapshot
from tests.contract.test_left_alone import tiny_bert
from tests.contract.training import NETS, Convolutional, Recurrent, batch, check_held, the_same, train

WAYS: dict[str, dict[str, Any]] = {
    "gradual": {"schedule": schedules.cubic(0.75, begin=1, end=6, every=2)},
    "channels": {"schedule": schedules.linear(0.5, begin=1, end=6), "pattern": "channel"},
    "moving": {"schedule": schedules.constant(0.75), "rewire": dynamic.rigl(every=2, end=9)},
    "moved": {
        "schedule": schedules.cubic(0.75, begin=1, end=6), "rewire": dynamic.movement(every=2, end=7),
    },
    "looking": {"schedule": schedules.one_shot(0.75, at=2), "grad_mask": False},
}  # fmt: skip
CASES = [(kind, way) for kind in NETS for way in WAYS if way == "gradual" or kind is Convolutional]


def started(kind: Callable[[], nn.Module], way: str) -> tuple[nn.Module, Optimizer, Pruner]:
    torch.manual_seed(0)
    model = kind()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return model, opt, Pruner(model, opt, **WAYS[way])


def outside(model: nn.Module) -> dict[str, Any]:
    """Everything about a model but its values and the gradients' hooks, which `Pruner.close` takes away."""
    return {
        "keys": list(model.state_dict()),
        "modules": [(n, id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        "parameters": [
            (n, id(p), p.data_ptr(), p.shape, p.dtype, p.stride(), p.requires_grad, p.is_leaf, list(vars(p)))
            for n, p in model.named_parameters()
        ],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "hooks": [{k: len(v) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)} for m in model.modules()],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_nothing_is_added_and_a_state_goes_both_ways(kind: type[nn.Module], way: str) -> None:
    torch.manual_seed(0)
    model, plain = kind(), kind()
    before = outside(model)
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    pruner = Pruner(model, opt, **WAYS[way])
    held = [id(p) for p in opt.param_groups[0]["params"]]
    train(model, opt, range(5), lambda: check_held(model, pruner) and None)
    assert outside(model) == before and held == [id(p) for p in model.parameters()]
    plain.load_state_dict(model.state_dict(), strict=True)
    assert snapshot(plain) == snapshot(model)
    model.load_state_dict(plain.state_dict(), strict=True)
    train(model, opt, range(5, 8), lambda: check_held(model, pruner) and None)
    assert pruner.steps == 8
    pruner.close()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_copies_are_plain_models(kind: type[nn.Module], way: str) -> None:
    model, opt, pruner = started(kind, way)
    train(model, opt, range(5))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies: list[nn.Module] = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False),
    ]  # fmt: skip
    want = snapshot(model)
    for other in copies:
        assert snapshot(other) == want
        alone = torch.optim.SGD(other.parameters(), lr=0.1)
        train(other, alone, range(5, 7))
        assert snapshot(other) != want
    assert snapshot(model) == want and pruner.steps == 5
    train(model, opt, range(5, 8))
    check_held(model, pruner)
    again, other_opt, other_pruner = started(kind, way)
    train(again, other_opt, range(8))
    assert the_same(again.state_dict(), model.state_dict()), "copies have changed nothing"
    assert the_same(other_pruner.state_dict(), pruner.state_dict())


@pytest.mark.parametrize(("kind", "way"), [c for c in CASES if c[0] is not Recurrent])  # dynamo does not take an LSTM
def test_compiled_whole_and_once(kind: type[nn.Module], way: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, opt, pruner = started(kind, way)
    fast = torch.compile(model, fullgraph=True, backend=backend)
    train(fast, opt, range(8), lambda: check_held(model, pruner) and None)
    assert len(graphs) == 1
    plain, other_opt, _ = started(kind, way)
    train(plain, other_opt, range(8))
    assert the_same(plain.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")  # torch, of any nn.LSTM
@pytest.mark.parametrize(("kind", "way"), CASES)
def test_exported_in_the_middle(kind: type[nn.Module], way: str) -> None:
    model, opt, pruner = started(kind, way)
    train(model, opt, range(4))
    model.eval()
    program = torch.export.export(model, (batch(0),))
    torch.testing.assert_close(program.module()(batch(1)), model(batch(1)), rtol=0, atol=0)
    assert {n: t.shape for n, t in program.state_dict.items()} == {n: t.shape for n, t in model.state_dict().items()}
    model.train()
    train(model, opt, range(4, 8), lambda: check_held(model, pruner) and None)


def test_save_pretrained_in_the_middle(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    model: Any = tiny_bert().train()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, opt, schedules.cubic(0.75, begin=1, end=5))
    tokens = torch.arange(16).view(2, 8)
    for t in range(7):
        opt.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        opt.step()
        check_held(model, pruner, opt)
        if t in (3, 6):
            model.save_pretrained(tmp_path / str(t))
            loaded: Any = BertForMaskedLM.from_pretrained(tmp_path / str(t))
            assert snapshot(loaded) == snapshot(model)
            assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
            zeros = sum(int((loaded.get_parameter(n) == 0).sum()) for n in pruner.masks())
            assert zeros == sum(int((~m).sum()) for m in pruner.masks().values()) > 0
    assert pruner.sparsity == 0.75
