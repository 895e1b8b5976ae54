"""Tensors that cannot be pruned as they are: refused by name and shape, before anything is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from secateur.errors import BadInput, BadTensor
from secateur.stores.base import choose
from secateur.stores.checks import SUPPORTED, overlap, overlaps_itself
from secateur.stores.memory import MemoryStore


def parameters_of(store: MemoryStore) -> int:
    """Elements of all parameters that can be counted, tied ones once."""
    return sum(s.numel for s in store.every())


def check(target: nn.Module | dict[str, Tensor] | Tensor, **filters: str) -> None:
    """As the verbs do: filters first, then the check."""
    store = MemoryStore(target)
    store.check(choose(store.specs(), **filters))


def refused(target: nn.Module | dict[str, Tensor] | Tensor, text: str, **filters: str) -> None:
    with pytest.raises(BadTensor, match=text):
        check(target, **filters)


def beside(weight: Tensor) -> dict[str, Tensor]:
    """A good tensor and the one in question."""
    return {"good.weight": torch.ones(4, 4), "bad.weight": weight}


class Wrapped(Tensor):
    """A subclass as quantisation libraries make them."""


def made_in_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, 3)


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8)


def compressed() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(2, 3, device="meta"), "on the meta device.*load the weights first"),
    "inference": (made_in_inference, "made under torch.inference_mode.*clone it"),
    "expanded": (lambda: torch.ones(2, 1).expand(2, 3), r"it is expanded.*t\.contiguous\(\)"),
    "windows": (lambda: torch.ones(4).as_strided((2, 3), (1, 1)), r"one place in memory; pass t\.contiguous"),
    "int8": (lambda: torch.ones(2, 3, dtype=torch.int8), "holds integers or quantised values.*ignore="),
    "int64": (lambda: torch.ones(2, 3, dtype=torch.int64), "holds integers or quantised values"),
    "uint16": (lambda: torch.ones(2, 3, dtype=torch.uint16), "holds integers or quantised values"),
    "bool": (lambda: torch.ones(2, 3, dtype=torch.bool), "holds integers or quantised values"),
    "quint8": (quantised, "holds integers or quantised values.*quantise afterwards"),
    "complex": (lambda: torch.ones(2, 3, dtype=torch.complex64), "it is complex; pass torch.view_as_real"),
    "e8m0": (lambda: torch.ones(2, 3).to(torch.float8_e8m0fnu), "dtype holds scales.*float8_e5m2fnuz"),
    "fp4": (
        lambda: torch.ones(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "dtype holds scales or"
    ),
    "coo": (lambda: torch.eye(3).to_sparse(), r"its layout is sparse_coo.*t\.to_dense\(\)"),
    "csr": (compressed, "its layout is sparse_csr"),
    "subclass": (lambda: torch.ones(2, 3).as_subclass(Wrapped), "test_bad_tensors.Wrapped.*are supported"),
    "int8_subclass": (
        lambda: torch.ones(2, 3, dtype=torch.int8).as_subclass(Wrapped), "holds integers or quantised values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors_are_refused_by_name_and_shape(kind: str) -> None:
    make, text = BAD[kind]
    weight = make()
    shape = ", ".join(map(str, weight.shape))
    refused(beside(weight), rf"cannot prune 'bad.weight' \(shape \({shape}\), \w+\): .*{text}")
    refused(weight, rf"cannot prune 'tensor' \(shape \({shape}\), \w+\): .*{text}")
    check(beside(weight), ignore="bad")


@pytest.mark.parametrize("kind", ["meta", "inference", "expanded", "complex", "coo", "e8m0"])
def test_bad_parameters_are_refused(kind: str) -> None:
    make, text = BAD[kind]
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[1].weight = nn.Parameter(make(), requires_grad=False)
    refused(model, rf"'1.weight' .*{text}")
    check(model, include="0")


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_supported_dtypes_pass(dtype: torch.dtype) -> None:
    check(torch.ones(4, 4).to(dtype))
    check(nn.Linear(4, 4).to(dtype) if dtype.itemsize > 1 else {"fc.weight": torch.ones(4, 4).to(dtype)})


def test_scaled_fp8_is_not_the_weights_themselves() -> None:
    target = {
        "fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "fc.weight_scale_inv": torch.ones(1, 1),
        "out.weight": torch.ones(4, 4),
    }
    refused(target, "'fc.weight' .*scaled by 'fc.weight_scale_inv'.*dequantise")
    check(target, ignore="fc")


def test_lazy_modules_are_refused_and_listed() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyConvTranspose2d(4, 1), nn.LazyBatchNorm2d(), nn.LazyLinear(3))
    assert {s.name: s.role for s in MemoryStore(model).specs() if s.skip is None} == {
        "0.weight": "conv", "1.weight": "conv_transpose", "3.weight": "linear",
    }  # fmt: skip
    refused(model, r"'0.weight' \(shape not known yet, float32\): it is lazy.*run a forward pass first")
    refused(next(model.parameters()), r"'tensor' \(shape not known yet.*run a forward pass first")
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 2))
    check(model)


def test_a_distributed_tensor_is_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(3, 3)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        refused(model, r"'weight' \(shape \(3, 3\), float32\): it is a DTensor")
        assert [s.name for s in MemoryStore(model).every()] == ["bias"]
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------ parametrised, masked, quantised


def masked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def old_weight_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[0])
    return model


def old_spectral_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.utils.spectral_norm(model[0])
    return model


def parametrised(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(wrap(nn.Linear(3, 4)), nn.Linear(4, 2))


HELD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "prune": (masked, r"secateur\.from_torch_prune\(model\)"),
    "weight_norm": (parametrised(parametrizations.weight_norm), "remove_parametrizations"),
    "spectral_norm": (parametrised(parametrizations.spectral_norm), "remove_parametrizations"),
    "orthogonal": (parametrised(parametrizations.orthogonal), "remove_parametrizations"),
    "old_weight_norm": (old_weight_norm, "remove_weight_norm"),
    "old_spectral_norm": (old_spectral_norm, "remove_spectral_norm"),
}


@pytest.mark.parametrize("kind", HELD)
def test_computed_weights_are_refused_under_their_own_name(kind: str) -> None:
    make, text = HELD[kind]
    model = make()
    parameters = sum(p.numel() for p in model.parameters())
    for target in (model, model.state_dict()):
        refused(target, rf"'0.weight' \(shape \(4, 3\), float32\): .*{text}")
        refused(target, text, include="0.weight")
        check(target, ignore="0")
        check(target, include="1")
        store = MemoryStore(target)
        assert parameters_of(store) == parameters
        picked = [s for s in store.specs() if s.skip is None]
        assert [(s.name, s.role) for s in picked] == [("0.weight", "linear"), ("1.weight", "linear")]
        assert picked[0].aliases
    raw = {n for n, _ in model.named_parameters()}
    assert raw == {n for s in MemoryStore(model).specs() for n in (s.name, *s.aliases) if n in raw}


def test_a_masked_bias_is_no_hindrance() -> None:
    model = nn.Linear(3, 4)
    prune.l1_unstructured(model, "bias", amount=1)
    check(model)
    refused(model, "from_torch_prune", include="bias")


def test_baked_models_pass() -> None:
    model = masked()
    prune.remove(model[0], "weight")
    check(model)


def test_a_mask_seen_through_a_tie() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    refused(model, "'0.weight'.*from_torch_prune")


def test_raw_tensors_named_v_and_g_are_no_weight_norm() -> None:
    gated = {"attn.w_v": torch.ones(3, 3), "attn.w_g": torch.ones(3, 3), "fc.weight": torch.ones(3, 3)}
    assert [s.name for s in MemoryStore(gated).specs()] == sorted(gated)
    check(gated)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LSTM(4, 4)], ids=["linear", "lstm"])
def test_quantised_modules_are_refused(layer: nn.Module) -> None:
    plain = nn.Sequential(layer, nn.ModuleDict({"keep": nn.Conv1d(4, 4, 1)}))
    model = torch.ao.quantization.quantize_dynamic(plain, {type(layer)}, dtype=torch.qint8)
    refused(model, r"'0.weight\w*' \(shape \(\d+, 4\), qint8\): it holds integers or quantised values")
    check(model, ignore="0")
    store = MemoryStore(model)
    assert parameters_of(store) == sum(p.numel() for p in model.parameters()) == 20
    assert [s.name for s in store.every()] == ["1.keep.bias", "1.keep.weight"]
    with pytest.raises(BadInput, match="Quantised modules cannot be pruned"):
        MemoryStore({k: v for k, v in model.state_dict().items() if "scale" not in k and "zero" not in k})


def test_eight_bit_modules_are_refused() -> None:
    class Int8Params(nn.Parameter):
        """As bitsandbytes keeps them."""

    model = nn.Linear(3, 4)
    model.weight = Int8Params(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    refused(model, r"'weight' \(shape \(4, 3\), int8\): it holds integers or quantised values")


# ------------------------------------------------------------------------------------ shared memory


def test_a_transposed_view_of_a_chosen_tensor_is_refused() -> None:
    w = torch.ones(3, 4)
    target = {"a.weight": w, "b.weight": w.t(), "c.weight": torch.ones(2, 2)}
    text = r"'[ab].weight' \(.*it shares memory with '[ab].weight' \(shape .*t\.clone\(\).*ignore="
    refused(target, text)
    refused(target, r"cannot prune 'a.weight'.*with 'b.weight'", ignore="b")
    refused(target, r"cannot prune 'b.weight'.*with 'a.weight'", ignore="a")
    check(target, include="c")
    check({**target, "b.weight": w.t().clone(memory_format=torch.contiguous_format)})


def test_overlaps_of_any_kind() -> None:
    base = torch.arange(24.0).view(4, 6)
    bad = {
        "rows": (base[:3], base[1:]),
        "inside": (base, base[1:2]),
        "other shape": (base, base.view(6, 4)),
        "other dtype": (base, base.view(torch.int32)),
        "columns": (base[:, :3], base[:, 2:5]),
        "row and column": (base[1:2], base[:, :2]),
    }
    for kind, (a, b) in bad.items():
        assert overlap(a, b) and overlap(b, a), kind
        refused({"a.weight": a, "mask": b}, "'a.weight' .*shares memory with 'mask'")


def test_disjoint_slices_of_one_storage_pass() -> None:
    base = torch.arange(24.0).view(4, 6)
    good = {
        "columns": (base[:, :3], base[:, 3:]),
        "alternate": (base[:, ::2], base[:, 1::2]),
        "rows": (base[:2], base[2:]),
        "apart": (torch.ones(2, 2), torch.ones(2, 2)),
    }
    for kind, (a, b) in good.items():
        assert not overlap(a, b) and not overlap(b, a), kind
        check({"a.weight": a, "b.weight": b})


def test_three_views_are_compared_pair_by_pair() -> None:
    base = torch.zeros(4, 6)
    check({"a.weight": base[:, :2], "b.weight": base[:, 2:4], "c.weight": base[:, 4:]})
    refused(
        {"a.weight": base[:, :2], "b.weight": base[:, 2:4], "c.weight": base[:, 3:]},
        "'[bc].weight'.*'[bc].weight'",
    )


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A view of 30 float32 anywhere in one fixed storage, of any strides."""
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
    reach = sum(max(s - 1, 0) * t for s, t in zip(shape, strides, strict=True))
    return STORAGE.as_strided(shape, strides, draw(st.integers(0, 29 - min(reach, 29))))


STORAGE = torch.arange(60.0)


def elements(t: Tensor) -> list[int]:
    return STORAGE.as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1).int().tolist()


@given(views(), views())
def test_overlap_is_exact(a: Tensor, b: Tensor) -> None:
    assert overlap(a, b) == bool(set(elements(a)) & set(elements(b)))


@given(views())
def test_internal_overlap_is_exact(t: Tensor) -> None:
    if all(stride > 0 or size < 2 for stride, size in zip(t.stride(), t.shape, strict=True)):
        assert overlaps_itself(t) == (len(set(elements(t))) < t.numel())


def test_channels_last_and_transposed_weights_pass() -> None:
    check(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last))
    check(torch.ones(3, 4).t())
    check(torch.ones(2, 3, 4).permute(2, 0, 1))


# ---------------------------------------------------------------------------------- what is touched


def test_only_chosen_tensors_are_checked() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model[0].bias = nn.Parameter(torch.ones(1).expand(3))
    check(model)
    refused(model, "'1.weight'.*complex", include="1.weight")
    refused(model, "'0.bias'.*expanded", include="0.bias")


def test_nothing_is_touched_by_a_refusal() -> None:
    model = masked()
    before = copy.deepcopy(model.state_dict())
    refused(model, "from_torch_prune")
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(model[0]._forward_pre_hooks) == 1
