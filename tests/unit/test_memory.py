"""The in-memory store: names, ties, parts that are the model's own memory, what counts as a parameter."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from secateur.core.types import Align, Spec
from secateur.errors import BadInput, NothingChosen
from secateur.stores.base import Store, choose
from secateur.stores.memory import MemoryStore
from secateur.stores.names import canonical


def parameters_of(store: MemoryStore) -> int:
    """Elements of all parameters that can be counted, tied ones once."""
    return sum(s.numel for s in store.every())


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(fc=nn.Linear(3, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 2, bias=False)))


NAMES = ["fc.bias", "fc.weight", "head.weight", "norm.bias", "norm.weight"]


def specs_of(target: nn.Module | dict[str, Tensor] | Tensor) -> dict[str, Spec]:
    return {s.name: s for s in MemoryStore(target).specs()}


def whole(store: MemoryStore, name: str, align: Align = "chunk") -> Tensor:
    (spec,) = (s for s in store.specs() if s.name == name)
    (part,) = store.parts(spec, align)
    assert part.spec is spec
    assert part.whole
    return part.tensor


# ----------------------------------------------------------------------------------------- protocol


def test_it_follows_the_protocol() -> None:
    store = MemoryStore(net())
    assert isinstance(store, Store)
    counts = torch.tensor([1, 2])
    assert store.sum(counts) is counts


def test_specs_are_sorted_by_name_and_know_the_order_of_registration() -> None:
    specs = MemoryStore(net()).specs()
    assert [s.name for s in specs] == NAMES
    assert [s.name for s in sorted(specs, key=lambda s: s.order or 0)] == [n for n, _ in net().named_parameters()]


@pytest.mark.parametrize("align", ["chunk", "unit", "whole"])
def test_a_part_is_the_memory_of_the_model(align: Align) -> None:
    model = net()
    store = MemoryStore(model)
    for name, parameter in model.named_parameters():
        tensor = whole(store, name, align)
        assert not tensor.requires_grad
        assert tensor.data_ptr() == parameter.data_ptr()
        tensor.view(-1)[0] = 7.0
        assert parameter.detach().view(-1)[0] == 7.0
        assert parameter.requires_grad


def test_a_part_of_a_strided_weight_is_strided() -> None:
    base = torch.arange(24.0).view(6, 4)
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(base.t())
    tensor = whole(MemoryStore(model), "weight")
    assert tensor.shape == (4, 6)
    assert not tensor.is_contiguous()
    tensor[1, 2] = 0.0
    assert base[2, 1] == 0.0
    assert model.weight[1, 2] == 0.0


def test_frozen_parameters_and_training_graphs() -> None:
    model = net()
    model.requires_grad_(False)
    MemoryStore(model).check(MemoryStore(model).specs())
    leaf = torch.ones(3, 3, requires_grad=True)
    product = leaf * 2
    whole(MemoryStore({"fc.weight": product}), "fc.weight")[0, 0] = 5.0
    assert product[0, 0] == 5.0
    assert product.requires_grad


def test_a_store_follows_a_parameter_whose_memory_was_replaced() -> None:
    model = nn.Linear(2, 2)
    store = MemoryStore(model)
    model.weight.data = torch.full((2, 2), 3.0)
    assert whole(store, "weight").eq(3.0).all()


def test_nothing_of_the_target_is_touched() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    store = MemoryStore(model)
    store.check(store.specs())
    for spec in store.specs():
        for part in store.parts(spec, "chunk"):
            store.write(part)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_parts_of_another_store_are_refused() -> None:
    (spec,) = MemoryStore(torch.ones(2)).specs()
    with pytest.raises(BadInput, match=r"'tensor' .* is not a tensor of this store"):
        MemoryStore(net()).parts(spec, "chunk")


# -------------------------------------------------------------------------------------------- names


class Sharded(nn.Module):
    """What FSDP leaves of a module's name, without a process group."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = inner


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(OrderedDict((k, checkpoint_wrapper(m)) for k, m in model.named_children()))


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda m: m,
    "compile": compiled,
    "compile_inside": lambda m: nn.Sequential(OrderedDict((k, compiled(c)) for k, c in m.named_children())),
    "data_parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged_compile": lambda m: torch.optim.swa_utils.AveragedModel(compiled(m)),
    "fsdp": Sharded,
    "checkpoint": checkpointed,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_no_part_of_a_name(wrapper: str) -> None:
    model = WRAPPED[wrapper](net())
    raw = {n for n, _ in model.named_parameters()}
    for target in (model, model.state_dict()):
        found = {n: s for n, s in specs_of(target).items() if s.role != "buffer"}
        assert list(found) == NAMES
        assert {n: s.role for n, s in found.items()}["fc.weight"] == "linear"
        assert found["fc.weight"].bias == "fc.bias"
    aliases = {a for s in specs_of(model).values() for a in s.aliases}
    assert aliases == raw - set(NAMES)


@pytest.mark.usefixtures("alone")
def test_distributed_data_parallel_is_no_part_of_a_name() -> None:
    model = nn.parallel.DistributedDataParallel(net())
    assert list(specs_of(model)) == list(specs_of(model.state_dict())) == NAMES
    assert specs_of(model)["fc.weight"].aliases == ("module.fc.weight",)


def test_raw_names_are_accepted_by_filters() -> None:
    specs = MemoryStore(nn.DataParallel(net())).specs()
    for glob in ("fc.weight", "module.fc.weight", "fc", "module.fc"):
        picked = choose(specs, include=glob)
        assert [s.name for s in picked if s.skip is None] == ["fc.weight"], glob


def test_a_child_called_module_is_an_ordinary_child() -> None:
    model = nn.Sequential(OrderedDict(module=nn.Linear(2, 2), other=nn.Linear(2, 2)))
    assert list(specs_of(model)) == list(specs_of(model.state_dict()))
    assert "module.weight" in specs_of(model)


def test_names_that_collide_are_refused() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2), _orig_mod=nn.Sequential(OrderedDict(fc=nn.Linear(2, 2)))))
    for target in (model, model.state_dict()):
        with pytest.raises(BadInput, match=r"'fc.weight' and '_orig_mod.fc.weight' have the same name"):
            MemoryStore(target)


def test_canonical_names_of_keys() -> None:
    assert canonical(["module.module.a", "module.module.b"]) == {
        "module.module.a": "a",
        "module.module.b": "b",
    }
    assert canonical(["n_averaged", "module.a"]) == {"n_averaged": "n_averaged", "module.a": "a"}
    assert canonical(["modules.a"]) == {"modules.a": "modules.a"}
    assert canonical([]) == {}


# --------------------------------------------------------------------------------------------- ties


class Tied(nn.Module):
    def __init__(self, first: str) -> None:
        super().__init__()
        parts = {"emb": nn.Embedding(9, 4), "out": nn.Linear(4, 9)}
        self.mid = nn.Linear(4, 4)
        for name in (first, *(set(parts) - {first})):
            self.add_module(name, parts[name])
        self.out.weight = self.emb.weight


@pytest.mark.parametrize("first", ["emb", "out"])
def test_what_is_tied_to_an_embedding_is_skipped(first: str) -> None:
    found = specs_of(Tied(first))
    other = {"emb": "out", "out": "emb"}[first]
    assert f"{other}.weight" not in found
    s = found[f"{first}.weight"]
    assert s.role == "embedding"
    assert s.aliases == (f"{other}.weight",)
    assert s.skip == {"emb": "tied to an embedding", "out": "tied to an embedding, 'emb.weight'"}[first]
    assert parameters_of(MemoryStore(Tied(first))) == 36 + 9 + 16 + 4


def test_a_module_and_its_dict_tie_alike() -> None:
    model = Tied("emb")
    a, b = specs_of(model), specs_of(model.state_dict())
    assert {n: (s.aliases, s.skip) for n, s in a.items()} == {n: (s.aliases, s.skip) for n, s in b.items()}


def test_a_shared_layer_is_one_layer() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found = specs_of(model)
    assert list(found) == ["0.bias", "0.weight"]
    assert found["0.weight"].aliases == ("2.weight",)
    assert found["0.weight"].bias == "0.bias"
    assert found["0.weight"].skip is None
    assert parameters_of(MemoryStore(model)) == 12


def test_the_bias_of_a_layer_may_be_registered_elsewhere_first() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))
            self.fc = nn.Linear(3, 3)
            self.fc.bias = self.bias

    assert specs_of(Model())["fc.weight"].bias == "bias"


def test_a_raw_name_of_a_layer_does_not_hide_its_role() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            fc = nn.Linear(3, 3)
            self.kernel = fc.weight
            self.fc = fc

    s = specs_of(Model())["kernel"]
    assert (s.role, s.skip, s.aliases, s.bias) == ("linear", None, ("fc.weight",), "fc.bias")


def test_empty_tensors_are_not_tied() -> None:
    found = specs_of({"a.weight": torch.empty(0, 3), "b.weight": torch.empty(0, 3)})
    assert list(found) == ["a.weight", "b.weight"]
    assert found["a.weight"].numel == 0


def test_views_of_one_storage_are_tensors_of_their_own() -> None:
    packed = torch.ones(9, 4)
    target = {"q.weight": packed[:3], "k.weight": packed[3:6], "v.weight": packed[6:]}
    assert list(specs_of(target)) == ["k.weight", "q.weight", "v.weight"]
    store = MemoryStore(target)
    store.check(store.specs())


# ----------------------------------------------------------------------------------------- counting


def test_every_parameter_is_counted_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 3), nn.Embedding(5, 3))
    model[2].weight = nn.Parameter(torch.zeros(3, 3))
    total = sum(p.numel() for p in model.parameters())
    for target in (model, model.state_dict(), dict(model.named_parameters())):
        store = MemoryStore(target)
        assert parameters_of(store) == total
        every = store.every()
        assert sum(s.numel for s in every) == total
        zeros = sum(int((p.tensor == 0).sum()) for s in every for p in store.parts(s, "chunk"))
        assert zeros == 9 + 3  # the linear layer's weight and the norm's bias


def test_what_has_no_values_is_not_in_every() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2), nn.Linear(2, 2, device="meta"))
    model.register_parameter("flags", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    store = MemoryStore(model)
    assert [s.name for s in store.every()] == ["0.bias", "0.weight"]


def test_one_tensor_is_named_tensor() -> None:
    x = torch.arange(6.0).view(2, 3)
    store = MemoryStore(x)
    assert [s.name for s in store.specs()] == ["tensor"]
    whole(store, "tensor").zero_()
    assert x.eq(0).all()
    assert parameters_of(store) == 6
    assert [s.name for s in MemoryStore(nn.Parameter(x)).every()] == ["tensor"]


def test_extra_state_in_a_state_dict_is_not_a_tensor() -> None:
    class Counter(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    assert list(specs_of(nn.Sequential(Counter(2, 2)).state_dict())) == ["0.bias", "0.weight"]


# ------------------------------------------------------------------------------------ wrong targets


class Report:
    """Stands for the report that `prune` returns: told by the name and package of its class."""


Report.__module__ = "secateur.report"


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (nn.ReLU(), NothingChosen, "this ReLU has no parameters"),
        ({}, NothingChosen, "the mapping has no tensors"),
        ({"n_extra._extra_state": 3}, NothingChosen, "the mapping has no tensors"),
        ({0: torch.ones(2)}, BadInput, "keys of a mapping are names of tensors; found 0, an int"),
        ({"a": None}, BadInput, "'a' is a NoneType"),
        ({"model": {"a": torch.ones(2)}}, BadInput, r"pass target\['model'\]"),
        ({"model": nn.Linear(2, 2)}, BadInput, r"Pass target\['model'\] itself"),
        ({"a": torch.ones(2).numpy()}, BadInput, "torch.from_numpy"),
        ({"a": 3.0}, BadInput, "'a' is a float. Leave it out"),
        (torch.ones(2).numpy(), BadInput, "Wrap it with torch.from_numpy"),
        (torch.ones(2).numpy()[0], BadInput, "numpy.float32"),
        ([torch.ones(2)], BadInput, "cannot prune a list. Pass an nn.Module, a dict"),
        (nn.Linear(2, 2).parameters(), BadInput, r"cannot prune a generator.*dict\(named_parameters"),
        (nn.Linear, BadInput, "cannot prune a type"),
        ("model.safetensors", BadInput, "cannot prune a str.*with out="),
        (None, BadInput, "cannot prune a NoneType"),
        (torch.optim.SGD([torch.ones(2, requires_grad=True)]), BadInput, "Pass the model that it trains"),
        (Report(), BadInput, "Pruning works in place and returns a report"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)
def test_other_targets_are_refused(target: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MemoryStore(target)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- speed


def test_it_is_quick() -> None:
    """Linear in the number of tensors; 12 µs of this thread each where it was measured, 200 allowed."""

    def seconds(layers: int) -> float:
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
        best = float("inf")
        for _ in range(5):
            start = time.thread_time()
            store = MemoryStore(model)
            for spec in store.specs():
                list(store.parts(spec, "chunk"))
            store.check(store.specs())
            best = min(best, time.thread_time() - start)
        return best

    small, large = seconds(55), seconds(550)
    assert small < 110 * 200e-6
    assert large < 40 * small
