"""Models of transformers, tiny and random, block by block against the loop written out; wrapped, compiled, in other modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.evaluate.blocks import find_blocks
from tests.contract.nets import snapshot
from tests.unit.calibrating import choosing, facts_of, hessian_of, inputs_of, norms_of, wanda

transformers = pytest.importorskip("transformers")
# Heads of models that no block holds are told of; other warnings remain errors.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ tensors? stays? dense:secateur.SecateurWarning")

LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
BERT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=6, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def tokens(*shapes: tuple[int, int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, shape, generator=g) for shape in shapes]


def padded(left: bool) -> list[dict[str, Tensor]]:
    """Batches of dicts, some of whose sequences are padded."""
    out = []
    for ids in tokens((3, 9), (2, 9), (3, 12)):
        mask = torch.ones_like(ids)
        mask[1, slice(0, 4) if left else slice(5, None)] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


SAME, MIXED = tokens((2, 10), (2, 10), (2, 10)), tokens((2, 5), (2, 14), (1, 9), (2, 14))
CASES: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "llama": (llama, "model.layers", SAME),
    "llama, lengths": (llama, "model.layers", MIXED),
    "llama, padded": (llama, "model.layers", padded(left=True)),
    "gpt2": (gpt2, "transformer.h", SAME),
    "gpt2, padded": (gpt2, "transformer.h", padded(left=True)),
    "opt": (opt, "model.decoder.layers", SAME),
    "opt, padded": (opt, "model.decoder.layers", padded(left=True)),
    "bert": (bert, "bert.encoder.layer", SAME),
    "bert, padded": (bert, "bert.encoder.layer", padded(left=False)),
    "gemma3": (gemma3, "model.layers", SAME),
    "gemma3, shorter than the window and longer": (gemma3, "model.layers", MIXED),
    "t5": (t5, "decoder.block", [{"input_ids": i, "decoder_input_ids": i[:, :6]} for i in MIXED]),
}


def run(model: nn.Module, data: Any) -> None:
    for batch in data:
        model(**batch) if isinstance(batch, dict) else model(batch)


def layers_of(model: nn.Module, block: str) -> list[str]:
    """The layers of a block, linear or transposed."""
    found = model.get_submodule(block).named_modules()
    return [f"{block}.{n}" for n, m in found if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def by_hand(model: nn.Module, stack: str, data: Any) -> None:
    """Block after block: the inputs of its layers in the whole network as it is by then, and Wanda's rule."""
    model.eval()
    for i in range(len(model.get_submodule(stack))):
        names = layers_of(model, f"{stack}.{i}")
        caught = inputs_of(model, names, lambda: run(model, data))
        for n in names:
            weight = model.get_submodule(n).weight
            upright = weight.data if isinstance(model.get_submodule(n), nn.Linear) else weight.data.T
            upright[torch.from_numpy(wanda(upright, norms_of(caught[n]), weight.numel() // 2))] = 0


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().train()


@pytest.mark.parametrize("case", CASES)
def test_as_the_loop_written_out(case: str) -> None:
    make, stack, data = CASES[case]
    model = made(make)
    other, facts = copy.deepcopy(model), facts_of(model)
    by_hand(other, stack, data)
    report = secateur.prune(model, 0.5, criterion="wanda", calibration=data)
    assert snapshot(model) == snapshot(other)
    assert {r.name.rpartition(".")[0] for r in report.chosen} == {
        n for i in range(3) for n in layers_of(model, f"{stack}.{i}")
    }
    assert report.sparsity == 0.5
    assert facts_of(model) == facts and any(facts["caches"].values())


@pytest.mark.filterwarnings("ignore:fewer inputs than features:secateur.SecateurWarning")
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3, shorter than the window and longer"])
def test_the_hessians_of_every_layer(case: str) -> None:
    """A solver gets 2/n Σ x xᵀ of what goes into the layer once the blocks before are pruned, of transposed layers too."""
    make, stack, data = CASES[case]
    model = made(make)
    got: dict[str, Tensor] = {}

    def solver(weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str) -> Any:
        got[name] = hessian.clone()
        return choosing(weight, hessian=hessian, pattern=pattern, count=count, name=name)

    dense = copy.deepcopy(model).eval()
    secateur.prune(model, 0.5, solver=solver, calibration=data)
    for i in range(3):
        names = layers_of(model, f"{stack}.{i}")
        # Blocks as they were when this one was observed: those before it pruned, it and those after dense.
        mixed = copy.deepcopy(dense)
        for j in range(i):
            mixed.get_submodule(f"{stack}.{j}").load_state_dict(model.get_submodule(f"{stack}.{j}").state_dict())
        caught = inputs_of(mixed, names, lambda m=mixed: run(m, data))
        for n in names:
            torch.testing.assert_close(got[f"{n}.weight"].double(), hessian_of(caught[n]), rtol=1e-5, atol=1e-8)


def test_experts_are_left_and_said_so_once() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    with pytest.warns(secateur.SecateurWarning) as seen:
        report = secateur.prune(model, 0.5, criterion="wanda", calibration=SAME)
    told = [str(w.message) for w in seen]
    assert len(told) == 1 and told == list(report.warnings)
    assert "6 tensors stay dense" in told[0] and "role experts cannot be observed" in told[0]
    assert seen[0].filename == __file__
    assert {r.name.split(".")[-2] for r in report.chosen} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum("role experts" in (r.skip or "") for r in report) == 6
    with pytest.raises(secateur.BadInput, match=r"asked for by name.*role experts cannot be observed"):
        secateur.prune(
            model, 0.5, criterion="wanda", calibration=SAME, include=["model.layers.0.mlp.experts.down_proj", "*q_proj"]
        )


def test_attention_of_torch() -> None:
    """The last product of nn.MultiheadAttention is observed; its packed projections are left."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    data = [torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)]
    report = secateur.prune(model, 0.5, criterion="wanda", calibration=data)
    assert {r.name.split(".", 2)[2] for r in report.chosen} == {
        "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip
    attention = copy.deepcopy(model.layers[0].self_attn).eval()
    calibration = secateur.Calibration(data[:1], forward=lambda m, x: m(x, x, x, need_weights=False))
    with pytest.warns(secateur.SecateurWarning, match=r"Hessian of 1 layer \(out_proj.weight: 14 of 16\)"):
        found = secateur.calibrate(attention, calibration, "hessian", include="out_proj.weight")
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(16))
        attention.out_proj.bias.zero_()
        x = attention(data[0], data[0], data[0], need_weights=False)[0]
    torch.testing.assert_close(found["out_proj.weight"]["hessian"], hessian_of(x))


def test_every_wrapper_gives_the_same() -> None:
    """Compiled as a whole, compiled layer by layer, in DataParallel: the mask of the model itself."""
    plain = made(llama)
    state = copy.deepcopy(plain.state_dict())
    secateur.prune(plain, 0.5, criterion="wanda", calibration=MIXED)
    by_layers = made(llama)
    for i, layer in enumerate(by_layers.model.layers):
        by_layers.model.layers[i] = torch.compile(layer, backend="eager")
    wrapped = {
        "whole": torch.compile(made(llama), backend="eager"),
        "layers": by_layers,
        "parallel": nn.DataParallel(made(llama)),
    }
    for how, model in wrapped.items():
        report = secateur.prune(model, 0.5, criterion="wanda", calibration=MIXED)
        found = {r.name for r in report.chosen}
        assert found == {n for n in state if "layers" in n and "proj" in n}, how
        assert list(snapshot(model).values()) == list(snapshot(plain).values()), how


def test_a_sequential_that_is_compiled() -> None:
    one = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    other = torch.compile(copy.deepcopy(one), backend="eager")
    data = [torch.randn(20, 6)]
    other(data[0])
    secateur.prune(one, 0.5, criterion="wanda", calibration=data)
    assert secateur.prune(other, 0.5, criterion="wanda", calibration=data).sparsity == 0.5
    assert list(snapshot(one).values()) == list(snapshot(other).values())
    torch.testing.assert_close(other(data[0]), one(data[0]))


def under_inference(model: nn.Module, batch: Any) -> None:
    with torch.inference_mode():
        model(batch)


def under_autocast(model: nn.Module, batch: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)


def test_a_forward_in_inference_mode() -> None:
    one, other = made(llama), made(llama)
    secateur.prune(one, 0.5, criterion="wanda", calibration=SAME)
    for blocks in ("auto", "whole"):
        model = copy.deepcopy(other)
        calibration = secateur.Calibration(SAME, forward=under_inference, blocks=blocks)
        report = secateur.prune(model, 0.5, solver=choosing, calibration=calibration)
        assert report.sparsity == 0.5
    secateur.prune(other, 0.5, criterion="wanda", calibration=secateur.Calibration(SAME, forward=under_inference))
    assert snapshot(one) == snapshot(other)


def test_a_forward_under_autocast() -> None:
    """Blocks run in the dtype that they run in within the model, and sums are taken in float32 all the same."""
    torch.manual_seed(0)
    model = llama()
    names, dense = layers_of(model, "model.layers.0"), copy.deepcopy(model).eval()
    caught = inputs_of(dense, names, lambda: [under_autocast(dense, b) for b in SAME])
    for how in ("calibrate", "prune"):
        got: dict[str, Tensor] = {}

        def solver(weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str, got: Any = got) -> Any:
            got[name] = hessian.clone()
            return choosing(weight, hessian=hessian, pattern=pattern, count=count, name=name)

        calibration = secateur.Calibration(SAME, forward=under_autocast)
        if how == "calibrate":
            found = secateur.calibrate(model, calibration, "hessian", include="model.layers.0")
            got |= {n: s["hessian"] for n, s in found.items()}
        else:
            secateur.prune(model, 0.5, solver=solver, calibration=calibration, include="model.layers.0")
        for n in names:
            assert got[f"{n}.weight"].dtype == torch.float32
            torch.testing.assert_close(got[f"{n}.weight"].double(), hessian_of(caught[n]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = llama().to(dtype)
    report = secateur.prune(model, 0.5, solver=choosing, calibration=SAME)
    assert report.sparsity == 0.5
    assert all(p.dtype == dtype for p in model.parameters())
    assert bool(torch.isfinite(model(SAME[0]).logits).all())


def test_where_blocks_are() -> None:
    sizes = {n: p.numel() for n, p in llama().named_parameters() if "proj" in n}
    assert [b.name for b in find_blocks(llama(), "auto", sizes)] == [f"model.layers.{i}" for i in range(3)]
    assert [b.name for b in find_blocks(nn.Sequential(nn.ReLU(), nn.ReLU()), "auto", {})] == ["0", "1"]
    act = nn.ReLU()
    twice = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    assert [b.name for b in find_blocks(twice, "auto", {})] == ["0", "1", "2", "3"]
