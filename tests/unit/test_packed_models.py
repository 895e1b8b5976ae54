"""Models of transformers and torch, tiny and random: packed, generating, saved in packed folders and built from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.core.layouts import Layout
from secateur.runtime.files import save_packed
from secateur.runtime.inventory import packed_report
from secateur.runtime.layers import PackedLayer
from secateur.runtime.load import from_packed, load_packed
from secateur.runtime.modules import pack, unpack
from tests.unit.packed_nets import LAYOUTS, sparse_, state

transformers = pytest.importorskip("transformers")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NONE)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **NONE, num_key_value_heads=2))


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**SIZES, **NONE, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma2ForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, **NONE, num_key_value_heads=2, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


# Each with the number of layers that are packed, and of layers that a report leaves for a tie.
MODELS: dict[Callable[[], nn.Module], tuple[int, int]] = {
    gpt2: (8, 1), llama: (15, 0), gemma2: (14, 1), bert: (13, 1), t5: (32, 1), mixtral: (9, 0)
}  # fmt: skip
models = pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)


def pruned(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return sparse_(make(), 0.3).to(dtype).eval()


def logits(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if isinstance(model, transformers.T5ForConditionalGeneration) else {}
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


def close(got: Tensor, want: Tensor) -> bool:
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 5e-3}[want.dtype]
    return got.dtype == want.dtype and bool((got - want).abs().max() <= allowed * want.abs().max())


def count(model: nn.Module) -> int:
    return sum(isinstance(m, PackedLayer) for m in model.modules())


@models
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_those_of_the_pruned_model(make: Any, layout: Layout, dtype: torch.dtype) -> None:
    model = pruned(make, dtype)
    dense = copy.deepcopy(model)
    assert pack(model, layout=layout) is model
    packed, tied = MODELS[make]
    assert count(model) == packed
    assert sum("its weight is also that of" in r.why for r in packed_report(model)) == tied
    assert close(logits(model), logits(dense))
    assert state(unpack(model)) == state(dense)


@pytest.mark.parametrize("make", [gpt2, llama, t5], ids=lambda m: m.__name__)
def test_it_generates(make: Any) -> None:
    model = pruned(make)
    how: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(IDS),
        "pad_token_id": 0,
    }
    want = model.generate(IDS, **how)  # type: ignore[operator]
    assert torch.equal(pack(model, layout="csr").generate(IDS, **how), want)  # type: ignore[operator]


def test_what_looks_at_a_weight_in_every_forward_does_not_expand_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack(pruned(t5), layout="csr")  # compares the dtype of wo.weight with that of its input
    expanded: list[Any] = []
    monkeypatch.setattr(PackedLayer, "dense", lambda self: expanded.append(self))
    logits(model)
    assert expanded == []


@models
@layouts
def test_a_packed_folder_makes_the_model(make: Any, layout: Layout, tmp_path: Path) -> None:
    want = pruned(make, torch.bfloat16)
    want.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    save_packed(tmp_path / "dense", tmp_path / "packed")
    model = from_packed(tmp_path / "packed", layout=layout)
    assert type(model) is type(want)
    assert not model.training
    assert model.dtype == torch.bfloat16
    # Tables are computed as transformers computes them when it loads a model of this dtype.
    dense = type(want).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()  # type: ignore[attr-defined]
    assert count(model) == MODELS[make][0]
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert close(logits(model), logits(dense))
    assert state(unpack(model)) == state(dense)
    assert torch.equal(logits(model), logits(dense))


def test_a_class_can_be_given(tmp_path: Path) -> None:
    want = pruned(llama)
    want.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    save_packed(tmp_path / "dense", tmp_path / "packed")
    for made in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        model = from_packed(tmp_path / "packed", made, layout="csr")
        assert type(model) is type(want)
        assert close(logits(model), logits(want))


@pytest.mark.parametrize("make", [gpt2, llama, bert], ids=lambda m: m.__name__)
def test_a_model_built_on_meta_is_filled(make: Any, tmp_path: Path) -> None:
    want = pruned(make)
    save_packed(want, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = make()
    model = load_packed(tmp_path / "m.safetensors", empty, layout="bitmask").eval()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])  # tables of positions are computed anew
    assert count(model) == MODELS[make][0]
    assert close(logits(model), logits(want))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@layouts
@pytest.mark.parametrize("include", [None, "layers.1"], ids=["all", "the second"])
def test_encoder_layers_that_torch_would_fuse(include: Any, layout: Layout) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = sparse_(nn.TransformerEncoder(layer, 2)).eval()
    dense = copy.deepcopy(model)
    pack(model, include=include, layout=layout)
    assert count(model) == (4 if include is None else 2)
    x, padded = torch.randn(3, 5, 32), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    with torch.inference_mode():
        assert torch.allclose(model(x), dense(x), atol=1e-5)
        got, want = (m(x, src_key_padding_mask=padded) for m in (model, dense))
    assert torch.allclose(got[~padded], want[~padded], atol=1e-5)


def test_memory_that_was_mapped_is_not_kept(tmp_path: Path) -> None:
    pruned(llama).save_pretrained(tmp_path)  # type: ignore[operator]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    maps = Path("/proc/self/maps")
    if not maps.exists() or str(tmp_path) not in maps.read_text():
        pytest.skip("nothing is mapped here")
    dense, ids = copy.deepcopy(model), [id(p) for n, p in model.named_parameters() if "embed" in n or "norm" in n]
    pack(model, layout="csr")
    assert str(tmp_path) not in maps.read_text()
    assert [id(p) for p in model.parameters()] == ids
    assert close(logits(model), logits(dense))
    assert state(unpack(model)) == state(dense)
