"""Roles and dims: what is chosen, how it lies, and what names and shapes alone tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.core.types import Spec
from secateur.errors import BadInput, NothingChosen
from secateur.stores.memory import MemoryStore
from secateur.stores.roles import ROLES, SKIPPED, assign


def specs_of(target: nn.Module | dict[str, Tensor] | Tensor, **options: object) -> dict[str, Spec]:
    return {s.name: s for s in MemoryStore(target, **options).specs()}


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


# ------------------------------------------------------------------------------ modules torch knows


@pytest.mark.parametrize(
    ("module", "leaf", "expected"),
    [
        (nn.Linear(3, 4), "weight", ("linear", 0, 1, 1, "bias")),
        (nn.Linear(3, 4, bias=False), "weight", ("linear", 0, 1, 1, None)),
        (nn.Bilinear(2, 3, 4), "weight", ("bilinear", 0, 1, 1, "bias")),
        (nn.Conv1d(4, 6, 3), "weight", ("conv", 0, 1, 1, "bias")),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", ("conv", 0, 1, 2, "bias")),
        (nn.Conv3d(4, 6, 3), "weight", ("conv", 0, 1, 1, "bias")),
        (nn.ConvTranspose2d(4, 6, 3), "weight", ("conv_transpose", 1, 0, 1, "bias")),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", ("conv_transpose", 1, 0, 2, "bias")),
        (nn.LSTM(3, 4), "weight_ih_l0", ("recurrent", 0, 1, 1, None)),
        (
            nn.LSTM(3, 4, proj_size=2, bidirectional=True),
            "weight_hr_l0_reverse",
            ("recurrent", 0, 1, 1, None),
        ),
        (nn.GRU(3, 4), "weight_hh_l0", ("recurrent", 0, 1, 1, None)),
        (nn.RNNCell(3, 4), "weight_hh", ("recurrent", 0, 1, 1, None)),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", ("attention", 0, 1, 1, "in_proj_bias")),
        (nn.MultiheadAttention(4, 2), "out_proj.weight", ("linear", 0, 1, 1, "out_proj.bias")),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "k_proj_weight", ("attention", 0, 1, 1, None)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v) if isinstance(v, str) else "",
)
def test_modules_of_torch(module: nn.Module, leaf: str, expected: tuple[object, ...]) -> None:
    s = specs_of(module)[leaf]
    assert (s.role, s.out_dim, s.in_dim, s.groups, s.bias) == expected
    assert s.skip is None
    weight = module.get_parameter(leaf)
    if s.bias is not None:
        assert s.out_dim is not None
        outputs = weight.shape[s.out_dim] * (s.groups if s.role == "conv_transpose" else 1)
        assert module.get_parameter(s.bias).numel() == outputs


@pytest.mark.parametrize(
    ("module", "leaf", "role"),
    [
        (nn.Embedding(9, 4), "weight", "embedding"),
        (nn.EmbeddingBag(9, 4), "weight", "embedding"),
        (nn.LayerNorm(4), "weight", "norm"),
        (nn.LayerNorm((4, 5), bias=False), "weight", "norm"),
        (nn.RMSNorm(4), "weight", "norm"),
        (nn.BatchNorm2d(4), "weight", "norm"),
        (nn.GroupNorm(2, 4), "weight", "norm"),
        (nn.InstanceNorm1d(4, affine=True), "weight", "norm"),
        (nn.PReLU(3), "weight", "norm"),
        (nn.Linear(3, 4), "bias", "bias"),
        (nn.LSTM(3, 4), "bias_ih_l0", "bias"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "bias"),
        (nn.ParameterList([torch.ones(3, 3)]), "0", "unknown"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_skipped_by_default(module: nn.Module, leaf: str, role: str) -> None:
    s = specs_of(module)[leaf]
    assert s.role == role
    assert s.skip == SKIPPED[role]


def test_subclasses_keep_the_role() -> None:
    class Standardised(nn.Conv2d):
        pass

    class Scaled(nn.Linear):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a, b)
            self.lora_A = nn.Parameter(torch.ones(b, a))

    found = specs_of(nn.Sequential(Standardised(2, 3, 1), Scaled(3, 2)))
    assert found["0.weight"].role == "conv"
    assert found["1.weight"].role == "linear"
    assert found["1.lora_A"].role == "adapter"


def test_every_role_is_documented_and_every_skipped_one_has_a_reason() -> None:
    assert set(SKIPPED) < set(ROLES)
    assert {"linear", "conv", "conv_transpose", "recurrent", "attention", "experts"}.isdisjoint(SKIPPED)


# ------------------------------------------------------------------- names and shapes alone: assign


def test_conv1d_of_gpt2_in_a_dict_square_layers_follow_their_siblings() -> None:
    fits = assign(
        {
            "h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,),
            "h.0.attn.c_proj.weight": (4, 4), "h.0.attn.c_proj.bias": (4,),
            "h.0.mlp.c_fc.weight": (4, 4), "h.0.mlp.c_fc.bias": (4,),
        }
    )  # fmt: skip
    for name in ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc"):
        fit = fits[f"{name}.weight"]
        assert (fit.role, fit.out_dim, fit.in_dim, fit.bias) == ("linear_transposed", 1, 0, f"{name}.bias"), name


def test_gpt_with_linear_layers_under_the_same_names() -> None:
    for bias in (True, False):
        shapes: dict[str, tuple[int, ...]] = {
            "h.0.attn.c_attn.weight": (12, 4), "h.0.attn.c_proj.weight": (4, 4),
            "h.0.mlp.c_fc.weight": (16, 4),
        }  # fmt: skip
        if bias:
            shapes |= {n.replace("weight", "bias"): s[:1] for n, s in shapes.items()}
        assert {f.role for n, f in assign(shapes).items() if n.endswith("weight")} == {"linear"}


def test_two_models_in_one_dict_follow_the_siblings_of_their_own_module() -> None:
    fits = assign(
        {
            "clip.c_fc.weight": (16, 4), "clip.c_fc.bias": (16,), "clip.c_proj.weight": (4, 4),
            "gpt.c_attn.weight": (4, 12), "gpt.c_attn.bias": (12,), "gpt.c_proj.weight": (4, 4),
        }
    )  # fmt: skip
    assert fits["clip.c_proj.weight"].role == "linear"
    assert fits["gpt.c_proj.weight"].role == "linear_transposed"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        # (experts, out, in), gate and up fused: the pair tells
        ({"gate_up_proj": (4, 6, 8), "down_proj": (4, 8, 3)}, ("experts", 1, 2)),
        ({"gate_up_proj": (4, 8, 6), "down_proj": (4, 3, 8)}, ("experts_transposed", 2, 1)),
        ({"gate_up_proj": (4, 16, 8), "down_proj": (4, 8, 8)}, ("experts", 1, 2)),
        ({"gate_up_proj": (4, 8, 16), "down_proj": (4, 8, 8)}, ("experts_transposed", 2, 1)),
        # up and down apart fit both ways: nothing tells
        ({"up_proj": (4, 6, 8), "down_proj": (4, 8, 6)}, ("experts", None, None)),
        ({"up_proj": (4, 8, 8), "down_proj": (4, 8, 8)}, ("experts", None, None)),
        # unless a bias does
        ({"up_proj": (4, 6, 8), "up_proj_bias": (4, 6), "down_proj": (4, 8, 6)}, ("experts", 1, 2)),
        (
            {"up_proj": (4, 8, 6), "up_proj_bias": (4, 6), "down_proj": (4, 6, 8)},
            ("experts_transposed", 2, 1),
        ),
    ],
)
def test_stacked_experts(shapes: dict[str, tuple[int, ...]], expected: tuple[object, ...]) -> None:
    fits = assign({f"mlp.experts.{k}": v for k, v in shapes.items()})
    for name, fit in fits.items():
        if name.endswith("proj"):
            assert (fit.role, fit.out_dim, fit.in_dim) == expected, name
            assert fit.batch_dims == (0,)
        else:
            assert fit.role == "bias"


def test_the_router_tells_how_experts_lie() -> None:
    for up, expected in (((4, 6, 8), ("experts", 1, 2)), ((4, 8, 6), ("experts_transposed", 2, 1))):
        fits = assign({"mlp.gate.weight": (4, 8), "mlp.experts.w1": up, "mlp.experts.w2": (4, *reversed(up[1:]))})
        assert {(f.role, f.out_dim, f.in_dim) for n, f in fits.items() if "experts" in n} == {expected}
        assert fits["mlp.gate.weight"].role == "router"


def test_a_gate_is_a_router_only_beside_experts() -> None:
    assert assign({"mlp.gate.weight": (4, 8), "mlp.up.weight": (4, 8)})["mlp.gate.weight"].role == "linear"
    experts = assign({"mlp.gate.weight": (4, 8), "mlp.experts.0.w1.weight": (6, 8)})
    assert experts["mlp.gate.weight"].role == "router"
    assert experts["mlp.experts.0.w1.weight"].role == "linear"


@pytest.mark.parametrize(
    ("name", "shape", "bias", "role"),
    [
        ("up.weight", (8, 4, 2, 2), (4,), "conv_transpose"),
        ("up.weight", (8, 4, 2, 2), (8,), "conv"),
        ("up.weight", (8, 2, 2, 2), (4,), "conv_transpose"),
        ("deconv1.weight", (4, 4, 2, 2), (4,), "conv_transpose"),
        ("conv_transpose.weight", (4, 4, 2), None, "conv_transpose"),
        ("conv1.weight", (4, 4, 2, 2), (4,), "conv"),
        ("conv1.weight", (4, 4, 2, 2), None, "conv"),
        ("norm.weight", (4, 5), None, "norm"),
        ("whatever.weight", (4, 5), (4, 5), "norm"),
        ("embed_tokens.weight", (90, 4), None, "embedding"),
        ("embed_tokens.0.weight", (90, 4), None, "embedding"),
        ("class_embed.weight", (90, 4), (90,), "linear"),
        ("patch_embed.weight", (90, 4), None, "linear"),
        ("wpe.weight", (20, 4), None, "position"),
        ("lm_head.weight", (90, 4), None, "head"),
        ("embed_out.weight", (90, 4), None, "head"),
        ("cls.predictions.decoder.weight", (90, 4), (90,), "head"),
        ("lm_head.dense.weight", (4, 4), (4,), "linear"),
        ("pooler.dense.weight", (4, 4), (4,), "linear"),
        ("classifier.weight", (2, 4), (2,), "linear"),
        ("x.weight", (2, 2, 2, 2, 2, 2), None, "unknown"),
        ("weight", (3, 4), None, "linear"),
    ],
)
def test_by_name_and_shape(name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, role: str) -> None:
    shapes = {name: shape} | ({name.replace("weight", "bias"): bias} if bias else {})
    fit = assign(shapes)[name]
    assert fit.role == role
    if role == "conv_transpose" and bias:
        assert fit.groups * shape[1] == bias[0]


def test_a_head_by_the_rows_of_the_vocabulary() -> None:
    shapes = {"tok_embeddings.weight": (500, 4), "output.weight": (500, 4), "block.output.weight": (4, 4)}
    fits = assign(shapes)
    assert fits["output.weight"].role == "head"
    assert fits["block.output.weight"].role == "linear"
    few = assign({"mask_tokens.weight": (4, 8), "decoder.weight": (4, 8)})
    assert few["decoder.weight"].role == "linear"


def test_buffers_in_a_dict_are_no_parameters() -> None:
    bn = specs_of(nn.BatchNorm1d(3).state_dict())
    assert {n: s.role for n, s in bn.items()} == {
        "weight": "norm", "bias": "bias", "running_mean": "buffer", "running_var": "buffer",
        "num_batches_tracked": "buffer",
    }  # fmt: skip
    mask = specs_of({"h.0.attn.bias": torch.ones(1, 1, 4, 4), "ids": torch.arange(3)})
    assert {s.role for s in mask.values()} == {"buffer"}
    assert mask["ids"].skip == "integers, not weights"


# -------------------------------------------------------------------------------------- given roles


def test_given_roles_override_what_names_tell() -> None:
    sd = {"0.weight": torch.ones(9, 4), "1.weight": torch.ones(4, 4), "1.bias": torch.ones(4)}
    assert specs_of(sd)["0.weight"].skip is None
    found = specs_of(sd, roles={"0.weight": "embedding", "1": "linear_transposed"})
    assert found["0.weight"].skip == "an embedding"
    assert (found["1.weight"].out_dim, found["1.weight"].in_dim, found["1.weight"].bias) == (1, 0, "1.bias")
    assert found["1.bias"].role == "bias"


def test_given_roles_choose_a_raw_tensor_and_later_ones_win() -> None:
    found = specs_of({"mix": torch.ones(3, 3), "blend": torch.ones(3, 3)}, roles={"*": "linear", "mix": "position"})
    assert found["mix"].skip == SKIPPED["position"]
    assert found["blend"].skip is None


def test_given_roles_lead_a_tied_tensor() -> None:
    w = torch.ones(9, 4)
    sd = {"embed_tokens.weight": w, "proj.weight": w}
    assert specs_of(sd)["embed_tokens.weight"].skip == "tied to an embedding"
    assert specs_of(sd, roles={"proj.weight": "linear"})["embed_tokens.weight"].skip is None


def test_given_roles_work_for_a_module_and_keep_its_groups() -> None:
    s = specs_of(nn.Conv2d(4, 4, 1, groups=2), roles={"weight": "conv_transpose"})["weight"]
    assert (s.role, s.out_dim, s.groups) == ("conv_transpose", 1, 2)


@pytest.mark.parametrize(
    ("roles", "error", "text"),
    [
        ({"fc.weight": "dense"}, BadInput, "one of these roles: linear"),
        ({"fc.weight": ["linear"]}, BadInput, "one of these roles"),
        ({3: "linear"}, BadInput, "one of these roles"),
        ({"fc.weight": "conv"}, BadInput, r"'fc.weight' \(shape \(4, 3\), float32\) cannot be that"),
        ({"fc": "conv"}, NothingChosen, "matches no tensor that can have this role"),
        ({"nothing*": "linear"}, NothingChosen, "'fc.weight'"),
        ("linear", BadInput, "roles maps globs to roles"),
    ],
)
def test_wrong_roles_are_refused(roles: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MemoryStore({"fc.weight": torch.ones(4, 3), "fc.bias": torch.ones(4)}, roles=roles)  # type: ignore[arg-type]


def test_a_head_that_only_the_model_knows() -> None:
    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.words = nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.words

    class Broken(Speaker):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    found = specs_of(nn.Sequential(Speaker(), Broken()))
    assert found["0.words.weight"].skip == SKIPPED["head"]
    assert found["1.words.weight"].skip is None


def test_one_tensor_is_always_chosen() -> None:
    expected = {
        (): ("unknown", None, None), (5,): ("unknown", None, None), (4, 3): ("linear", 0, 1),
        (4, 3, 2): ("conv", 0, 1), (4, 3, 2, 2): ("conv", 0, 1), (2,) * 6: ("unknown", None, None),
    }  # fmt: skip
    for shape, (role, out_dim, in_dim) in expected.items():
        (s,) = MemoryStore(torch.ones(shape)).specs()
        assert (s.name, s.role, s.out_dim, s.in_dim, s.skip) == ("tensor", role, out_dim, in_dim, None)
    assert specs_of(torch.ones(4, 3), roles={"tensor": "linear_transposed"})["tensor"].out_dim == 1
    assert specs_of(torch.ones(4, 3), roles={})["tensor"].role == "linear"


def test_what_a_dict_cannot_tell() -> None:
    """The differences that the module's docstring lists: if one goes, the list is out of date."""

    def role(net: nn.Module, name: str) -> tuple[str, str]:
        return specs_of(net)[name].role, specs_of(net.state_dict())[name].role

    assert role(nn.Sequential(nn.Embedding(9, 4)), "0.weight") == ("embedding", "linear")
    named = nn.ModuleDict({"value_embedding": nn.Linear(4, 4, bias=False)})
    assert role(named, "value_embedding.weight") == ("linear", "embedding")
    assert role(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), "0.weight") == ("conv_transpose", "conv")
    assert role(nn.Sequential(nn.Bilinear(2, 3, 4)), "0.weight") == ("bilinear", "conv")
    assert role(nn.Sequential(nn.LayerNorm((4, 5), bias=False)), "0.weight") == ("norm", "linear")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    assert specs_of(grouped)["0.weight"].groups == 2
    assert specs_of(grouped.state_dict())["0.weight"].groups == 1
