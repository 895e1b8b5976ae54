"""Heads in models of transformers and torch: what is pruned is the heads that the model itself takes for such.

Zeroing the projections of some heads must make exactly their part of what comes into the output projection zero, and leave the
rest of it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.heads import Head
from secateur.core.plan import Plan, Row
from tests.contract.nets import snapshot

Make = Callable[[], nn.Module]
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
BERT = {"hidden_size": 24, **SMALL}
GPT2 = {"n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 16}
PICTURE = {"hidden_size": 24, **SMALL, "image_size": 8, "patch_size": 4}
GROUPED = {"num_key_value_heads": 2, **BERT}


def pretrained(name: str, **config: Any) -> Make:
    """A tiny model of transformers with random weights and biases."""

    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        cls = getattr(transformers, name)
        model: nn.Module = cls(cls.config_class(**config)).eval()
        g = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data.normal_(generator=g)
        return model

    return make


MODELS: dict[str, tuple[Make, int]] = {
    "bert": (pretrained("BertModel", **BERT), 4),
    "distilbert": (pretrained("DistilBertModel", dim=24, n_layers=1, n_heads=4, hidden_dim=32, vocab_size=50), 4),
    "albert": (pretrained("AlbertModel", embedding_size=8, **BERT), 4),
    "deberta": (pretrained("DebertaV2Model", **BERT), 4),
    "mpnet": (pretrained("MPNetModel", **BERT), 4),
    "modernbert": (pretrained("ModernBertModel", pad_token_id=0, **BERT), 4),
    "t5": (pretrained("T5EncoderModel", d_model=24, d_kv=6, num_layers=1, num_heads=4, d_ff=32, vocab_size=50), 4),
    "llama": (pretrained("LlamaModel", attention_bias=True, **GROUPED), 2),
    "qwen3": (pretrained("Qwen3Model", head_dim=8, **GROUPED), 2),
    "phi3": (pretrained("Phi3Model", pad_token_id=0, **GROUPED), 2),
    "gpt2": (pretrained("GPT2Model", **GPT2), 4),
    "gpt_neo": (
        pretrained("GPTNeoModel", hidden_size=24, num_layers=1, num_heads=4, vocab_size=50, max_position_embeddings=16,
                   attention_types=[[["global"], 1]]), 4,
    ),
    "gpt_neox": (pretrained("GPTNeoXModel", **BERT | {"hidden_size": 32}), 4),
    "bloom": (pretrained("BloomModel", hidden_size=24, n_layer=1, n_head=4, vocab_size=50), 4),
    "falcon": (
        pretrained("FalconModel", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_kv_heads=2,
                   new_decoder_architecture=True, vocab_size=50), 2,
    ),
    "starcoder": (pretrained("GPTBigCodeModel", **GPT2), 1),
    "opt": (
        pretrained("OPTModel", hidden_size=24, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32, vocab_size=50,
                   word_embed_proj_dim=24, max_position_embeddings=16), 4,
    ),
    "mpt": (pretrained("MptModel", d_model=24, n_layers=1, n_heads=4, vocab_size=50, max_seq_len=16), 4),
    "vit": (pretrained("ViTModel", **PICTURE), 4),
}  # fmt: skip
"""Models of one layer with 4 heads, and how many units those are."""


def example(name: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=g)}
    return {"input_ids": torch.randint(3, 50, (2, 7), generator=g)}


@contextmanager
def into(module: nn.Module) -> Iterator[list[Tensor]]:
    """What comes into a module."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    yield seen
    handle.remove()


def output_row(plan: Plan) -> Row:
    (row,) = [r for r in plan.chosen if r.attention is not None and r.attention.dim == r.in_dim]
    return row


@pytest.mark.parametrize("name", MODELS)
def test_the_heads_are_those_of_the_model(name: str) -> None:
    make, units = MODELS[name]
    model = make()
    plan = secateur.plan(model, 0.5, pattern="head:4", allocation="uniform")
    row = output_row(plan)
    assert Head(4).grid(row.spec).units == units and len(row.units or ()) == units // 2
    dead = torch.zeros(units, dtype=torch.bool)
    dead[list(row.units or ())] = True
    dead = dead.repeat_interleave(row.shape[row.in_dim or 0] // units)
    with torch.no_grad(), into(model.get_submodule(row.name.removesuffix(".weight"))) as seen:
        model(**example(name))
        secateur.apply(plan, model)
        model(**example(name))
    before, after = seen
    assert bool((after[..., dead] == 0).all())
    assert torch.allclose(after[..., ~dead], before[..., ~dead], atol=1e-5)
    assert bool((after[..., ~dead] != 0).any(dim=(0, 1)).all())


@pytest.mark.parametrize("name", MODELS)
def test_a_dict_of_the_model_is_pruned_alike(name: str) -> None:
    model = MODELS[name][0]()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for target in (model, state):
        assert secateur.prune(target, 0.5, pattern="head:4", allocation="uniform").total
    assert snapshot({n: state[n] for n in model.state_dict()}) == snapshot(model)


@pytest.mark.parametrize("separate", [False, True])
def test_torchs_own_attention(separate: bool) -> None:
    """All the same whether queries, keys and values are packed, and with biases added to keys and values."""
    g = torch.Generator().manual_seed(0)
    more = {"kdim": 6, "vdim": 5} if separate else {}
    layer = nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True, **more).eval()
    layer.out_proj.weight.data = torch.eye(8)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g) if p is not layer.out_proj.weight else p.data
    x = [torch.randn(2, 3, n, generator=g) for n in ((8, 6, 5) if separate else (8, 8, 8))]
    before = layer(*x)[0]
    plan = secateur.plan(layer, 0.5, pattern="head:4", allocation="uniform")
    report = secateur.apply(plan, layer)
    dead = torch.zeros(4, dtype=torch.bool)
    dead[list(plan.chosen[0].units or ())] = True
    dead = dead.repeat_interleave(2)
    after = layer(*x)[0]
    assert int(dead.sum()) == 4 and torch.allclose(after[..., ~dead], before[..., ~dead], atol=1e-5)
    assert torch.equal(after[..., dead], layer.out_proj.bias[dead].expand(2, 3, 4))
    assert bool((layer.in_proj_bias.view(3, 8)[:, dead] == 0).all()) and bool(
        (layer.in_proj_bias.view(3, 8)[:, ~dead] != 0).all()
    )
    assert bool((layer.bias_k[..., dead] == 0).all()) and bool((layer.bias_v[..., ~dead] != 0).all())
    assert {r.name for r in report.shown if r.goes_with} == {"in_proj_bias", "bias_k", "bias_v"}
