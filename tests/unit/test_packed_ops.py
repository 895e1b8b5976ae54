"""The operators of packed layers: what torch asks of an operator, and everything they refuse."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.core.layouts import arrange
from secateur.errors import BadInput, NotDefined
from secateur.runtime.ops import packed_linear, packed_weight
from tests.unit.packed_nets import LAYOUTS, near

# What torch's own tools say of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
ROWS, COLUMNS = 24, 100
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def weight() -> Tensor:
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    w[w.abs() < 1] = 0
    return w


PARTS = {layout: list(arrange(weight(), layout)) for layout in LAYOUTS}


def run(x: Tensor, layout: str, bias: Tensor | None = None) -> Tensor:
    return packed_linear(x, PARTS[layout], bias, layout, COLUMNS)


@layouts
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_an_operator_as_torch_wants_them(layout: str, biased: bool) -> None:
    bias = torch.randn(ROWS) if biased else None
    torch.library.opcheck(packed_linear, (torch.randn(2, 3, COLUMNS), PARTS[layout], bias, layout, COLUMNS))
    torch.library.opcheck(packed_weight, (PARTS[layout], layout, COLUMNS))


@layouts
def test_the_weight_comes_back(layout: Any) -> None:
    w = weight()
    w[0, 0], w[1, 1] = -0.0, float("nan")
    back = packed_weight(list(arrange(w, layout)), layout, COLUMNS)
    assert torch.equal(back.view(torch.int32), w.view(torch.int32))


@layouts
def test_strides_and_shapes(layout: str) -> None:
    x = torch.randn(4, COLUMNS, 3)
    inputs = {
        "a vector": x[0, :, 0], "turned": x.transpose(1, 2), "one row many times": x[0, :, 0].expand(5, 2, -1),
        "no rows": x[:0, :, 0], "none in the middle": x.new_empty(2, 0, COLUMNS),
        "every other": torch.randn(6, 2 * COLUMNS)[::2, ::2],
    }  # fmt: skip
    for name, t in inputs.items():
        got = run(t, layout)
        assert near(got, t, weight(), None), name
        assert got.is_contiguous(), name


@layouts
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_whole(layout: str, backend: str) -> None:
    torch._dynamo.reset()

    def model(x: Tensor) -> Tensor:
        return run(x.relu(), layout) + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (5, 1, 7):
        x = torch.randn(rows, COLUMNS)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with pytest.raises(Exception, match=r"secateur\.unpack"):
        compiled(x.clone().requires_grad_())


def test_gradients_are_refused_where_they_are_asked_for() -> None:
    x, bias = torch.randn(3, COLUMNS), torch.zeros(ROWS)
    asks = x.clone().requires_grad_()
    refused = pytest.raises(NotDefined, match=r"secateur\.unpack\(model\)")
    with refused:
        run(asks, "csr")
    with refused:
        run(x, "csr", bias.clone().requires_grad_())
    with refused:
        torch.func.grad(lambda t: run(t, "csr").sum())(x)
    with refused:
        torch.func.vmap(lambda t: run(t, "csr"))(x)
    with refused, torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(x, x), "csr")
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            assert not run(asks, "csr", bias).requires_grad
    assert near(run(x, "csr"), x, weight(), None)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_a_linear_layer_gives(given: torch.dtype, lower: torch.dtype) -> None:
    x = torch.randn(3, COLUMNS).to(given)
    with torch.autocast("cpu", lower):
        got, want = run(x, "bitmask"), nn.functional.linear(x, weight())
        compiled = torch.compile(lambda t: run(t, "bitmask"), fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == want.dtype == compiled.dtype == lower
    assert torch.allclose(got.float(), x.float() @ weight().t(), rtol=0.02, atol=0.05)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_sequences_of_several_lengths() -> None:
    rows = [torch.randn(n, COLUMNS) for n in (3, 1, 4)]
    got = run(torch.nested.as_nested_tensor(rows), "csr")
    assert got.is_nested
    for out, x in zip(got.unbind(), rows, strict=True):
        assert near(out, x, weight(), None)


ONES = torch.ones(2, COLUMNS)
REFUSED: dict[str, tuple[Any, str]] = {
    "another dtype": (lambda: run(ONES.half(), "csr"), "is float32, and the input float16 of shape (2, 100)"),
    "integers": (lambda: run(ONES.long(), "csr"), "the input int64"),
    "too few features": (lambda: run(ONES[:, :9], "csr"), "takes 100 features in the last dim; the input is (2, 9)"),
    "no dims": (lambda: run(torch.tensor(1.0), "csr"), "the input is ()"),
    "on meta": (lambda: run(ONES.to("meta"), "csr"), "the input on meta"),
    "a short bias": (lambda: run(ONES, "csr", torch.zeros(3)), "the bias is (3,)"),
    "a bias of another dtype": (lambda: run(ONES, "csr", torch.zeros(ROWS).half()), "of float16"),
    "the other layout": (lambda: packed_linear(ONES, PARTS["bitmask"], None, "csr", COLUMNS), "are no csr of 100"),
    "no layout": (lambda: packed_linear(ONES, PARTS["bitmask"], None, "coo", COLUMNS), "are no coo"),
    "a weight of no layout": (lambda: packed_weight(PARTS["csr"], "coo", COLUMNS), "are no coo"),
    "too many columns": (lambda: packed_weight(PARTS["bitmask"], "bitmask", 1000), "are no bitmask of 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, text = REFUSED[case]
    with pytest.raises(BadInput) as e:
        call()
    assert text in str(e.value)


class Model(nn.Module):
    """A packed product in a module, for export."""

    def __init__(self) -> None:
        super().__init__()
        for name, part in zip(("where", "values", "starts"), arrange(weight(), "csr"), strict=True):
            self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.get_buffer(name) for name in ("where", "values", "starts")]
        return packed_linear(x, parts, None, "csr", COLUMNS)


def test_export_saves_and_loads() -> None:
    file = io.BytesIO()
    exported = torch.export.export(Model(), (torch.randn(2, COLUMNS),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(exported.run_decompositions(), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (1, 9):
        x = torch.randn(rows, COLUMNS)
        assert near(loaded(x), x, weight(), None)
