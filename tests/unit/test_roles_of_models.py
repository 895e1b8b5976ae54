"""Whole models, and those of transformers: a module and its state_dict choose the same tensors, alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from secateur.core.types import Spec
from secateur.stores.memory import MemoryStore
from secateur.stores.roles import SKIPPED


def specs_of(target: nn.Module | dict[str, Tensor]) -> dict[str, Spec]:
    return {s.name: s for s in MemoryStore(target).specs()}


def facts(spec: Spec) -> tuple[object, ...]:
    """All that decides how a tensor is pruned."""
    return (
        spec.role,
        spec.shape,
        spec.out_dim,
        spec.in_dim,
        spec.batch_dims,
        spec.bias,
        spec.skip,
        spec.aliases,
    )


class Residual(nn.Module):
    """A block as in torchvision's ResNets, with a depthwise convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.downsample = nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c))


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Residual(4), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 5)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.out = nn.Conv2d(4, 1, 1)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True)
        self.classifier = nn.Linear(10, 3)


def transformer_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, norm=nn.LayerNorm(8))


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 12, batch_first=True)


HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def pretrained(name: str, **config: object) -> Callable[[], nn.Module]:
    """A tiny model of transformers, by the name of its class, with random weights."""

    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        cls = getattr(transformers, name)
        return cls(cls.config_class(**config))

    return make


GPT2 = {
    "vocab_size": 40, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OPT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2,
    "max_position_embeddings": 20,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BERT = {"vocab_size": 40, "max_position_embeddings": 20, **HIDDEN}
KV = {"vocab_size": 40, "num_key_value_heads": 1, **HIDDEN}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": SmallResNet,
    "unet": UNet,
    "lstm": Tagger,
    "transformer_encoder": transformer_encoder,
    "transformer": transformer,
    "bert": pretrained("BertForSequenceClassification", **BERT),
    "bert_mlm": pretrained("BertForMaskedLM", **BERT),
    "bert_mlm_untied": pretrained("BertForMaskedLM", tie_word_embeddings=False, **BERT),
    "roberta": pretrained("RobertaForMaskedLM", pad_token_id=1, **BERT),
    "distilbert": pretrained("DistilBertForMaskedLM", vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
    "gpt2": pretrained("GPT2LMHeadModel", **GPT2),
    "gpt2_square": pretrained("GPT2LMHeadModel", n_inner=16, tie_word_embeddings=False, **GPT2),
    "llama": pretrained("LlamaForCausalLM", **KV),
    "llama_tied": pretrained("LlamaForCausalLM", tie_word_embeddings=True, **KV),
    "mixtral": pretrained("MixtralForCausalLM", num_local_experts=4, **KV),
    "qwen2_moe": pretrained(
        "Qwen2MoeForCausalLM",
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        **KV,
    ),
    "gpt_oss": pretrained("GptOssForCausalLM", num_local_experts=4, head_dim=8, **KV),
    "t5": pretrained("T5ForConditionalGeneration", **T5),
    "vit": pretrained("ViTForImageClassification", image_size=8, patch_size=4, **HIDDEN),
    "opt": pretrained("OPTForCausalLM", word_embed_proj_dim=8, **OPT),
    "neox": pretrained("GPTNeoXForCausalLM", **BERT),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_module_and_its_state_dict_agree(model: str) -> None:
    net = MODELS[model]()
    parameters = {n for n, _ in net.named_parameters()}
    in_module = specs_of(net)
    in_dict = specs_of(net.state_dict())
    assert set(in_module) == parameters
    assert {n: facts(s) for n, s in in_dict.items() if n in parameters} == {n: facts(s) for n, s in in_module.items()}
    assert all(s.skip is not None for n, s in in_dict.items() if n not in parameters)
    order = sorted(in_module.values(), key=lambda s: s.order or 0)
    assert [s.name for s in order] == [n for n, _ in net.named_parameters()]
    in_order = sorted((s for n, s in in_dict.items() if n in parameters), key=lambda s: s.order or 0)
    assert [s.name for s in in_order] == [s.name for s in order]


def chosen(model: str) -> dict[str, str]:
    return {n: s.role for n, s in specs_of(MODELS[model]()).items() if s.skip is None}


def test_bert_prunes_all_matrices_but_tables_and_head() -> None:
    found = chosen("bert")
    assert len(found) == 2 * 6 + 2
    assert found["bert.pooler.dense.weight"] == found["classifier.weight"] == "linear"
    head = specs_of(MODELS["bert_mlm_untied"]())["cls.predictions.decoder.weight"]
    assert head.skip == "the output head of a language model"
    tied = specs_of(MODELS["bert_mlm"]())["bert.embeddings.word_embeddings.weight"]
    assert tied.skip == "tied to an embedding"
    assert tied.aliases == ("cls.predictions.decoder.weight",)


def test_gpt2_prunes_its_transposed_layers() -> None:
    found = specs_of(MODELS["gpt2_square"]())
    picked = [s for s in found.values() if s.skip is None]
    assert len(picked) == 2 * 4
    assert {(s.role, s.out_dim, s.in_dim) for s in picked} == {("linear_transposed", 1, 0)}
    assert found["lm_head.weight"].role == "head"


def test_mixtral_prunes_its_experts_and_not_its_routers() -> None:
    found = specs_of(MODELS["mixtral"]())
    experts = [s for s in found.values() if s.role == "experts"]
    assert len(experts) == 2 * 2
    assert {(s.out_dim, s.in_dim, s.batch_dims, s.skip) for s in experts} == {(1, 2, (0,), None)}
    assert [s.skip for s in found.values() if s.role == "router"] == [SKIPPED["router"]] * 2
    assert found["lm_head.weight"].skip == SKIPPED["head"]
    oss = [s for s in specs_of(MODELS["gpt_oss"]()).values() if "experts" in s.role]
    assert {(s.role, s.out_dim, s.in_dim) for s in oss} == {("experts_transposed", 2, 1)}


def test_t5_shares_one_table() -> None:
    found = specs_of(MODELS["t5"]())
    assert found["shared.weight"].skip == "tied to an embedding"
    assert set(found["shared.weight"].aliases) >= {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }
    bias = found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert bias.role == "position"
