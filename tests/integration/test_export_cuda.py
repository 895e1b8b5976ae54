"""2:4 on a GPU: what holds the pattern is converted, gives the same outputs, and all else stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import BadInput, NotDefined, SecateurError
from secateur.runtime.export import export

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def net(dtype: torch.dtype = torch.float16) -> nn.Sequential:
    """Two layers that hold 2:4, and a head that does not."""
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    model = model.to("cuda", dtype)
    secateur.prune(model, pattern="2:4", ignore="4")
    return model


def weights(model: nn.Module) -> list[Any]:
    return [(n, id(p), type(p.data), p.detach().cpu()) for n, p in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_holds_the_pattern_is_converted(dtype: torch.dtype) -> None:
    model, x = net(dtype).train(), torch.randn(32, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        before = model(x)
    made = export(model, None, "semi-structured", x)
    assert made.facts["layers"] == ["0.weight", "2.weight"]
    assert "have more than 2 weights that are not zero" in made.facts["left"]["4.weight"]
    assert all(isinstance(model[i].weight.data, torch.sparse.SparseSemiStructuredTensor) for i in (0, 2))
    assert (made.zeros, made.total) == (32768, 65536)
    assert made.bytes < 0.6 * made.facts["dense_bytes"]
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        after = model(x)
    assert float((after - before).abs().max()) <= 0.02 * float(before.abs().max())


def test_what_cannot_be_converted_is_named_and_nothing_has_changed() -> None:
    model, x = net(), torch.randn(32, 128, device="cuda", dtype=torch.float16)
    before = weights(model)
    with pytest.raises(NotDefined, match=r"'4.weight' .* groups of 4"):
        export(model, None, "semi-structured", x, include="4")
    dense = nn.Linear(128, 64).half().cuda()
    with pytest.raises(BadInput, match=r"'weight': .* of its 2048 groups of 4 have more than 2"):
        export(dense, None, "semi-structured", x)
    with pytest.raises(BadInput, match="it is float32"):
        export(net(torch.float32), None, "semi-structured", x.float())
    assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(weights(model), before, strict=True))


class Counts(nn.Module):
    """Gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = net()[0]
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(x) * self.calls
        return out


def test_other_outputs_put_the_weights_back() -> None:
    model = Counts()
    before = weights(model)
    with pytest.raises(SecateurError, match="differ from the model's by"):
        export(model, None, "semi-structured", torch.randn(32, 128, device="cuda", dtype=torch.float16))
    assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(weights(model), before, strict=True))
