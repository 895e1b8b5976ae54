"""Pruning with data on a GPU: the same masks as on the CPU, exact counts, and undone after an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.contract.nets import is_zero
from tests.unit.calibrating import batches, choosing, mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

HOWS: dict[str, dict[str, Any]] = {
    "wanda": {"criterion": "wanda"},
    "wanda, 2:4": {"criterion": "wanda", "pattern": "2:4", "sparsity": None},
    "one pool": {"criterion": "wanda", "pattern": "unstructured", "allocation": "global"},
    "outliers": {"criterion": "wanda", "allocation": secateur.OWL(outlier=1.5)},
    "sparsegpt": {"solver": "sparsegpt"},
    "exactobs": {"solver": "exactobs"},
    "refit": {"criterion": "wanda", "solver": "refit"},
    "taylor": {"criterion": "taylor"},
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.clone()).square().mean()


@pytest.mark.parametrize("blocks", ["auto", "layers"])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_the_masks_of_the_cpu(how: dict[str, Any], blocks: str) -> None:
    """Batches come from the CPU and are moved; weights stay where they are. In float64, where no two scores are near."""
    here, there = mlp(), mlp().cuda()
    calibration = secateur.Calibration(batches(), blocks=blocks, loss=loss)
    reports = [secateur.prune(m, **{"sparsity": 0.5, **how}, calibration=calibration) for m in (here, there)]
    for n, p in here.named_parameters():
        q = there.get_parameter(n)
        assert q.is_cuda and torch.equal(is_zero(p), is_zero(q).cpu()), n
        torch.testing.assert_close(q.cpu(), p, rtol=1e-6, atol=1e-9)
    assert reports[0].zeros == reports[1].zeros


def test_statistics_of_one_device_on_another() -> None:
    here, there = mlp(), mlp().cuda()
    measured = secateur.calibrate(there, batches())
    assert all(s["input_norm"].is_cuda for s in measured.values())
    for model in (here, there):
        secateur.prune(model, 0.5, criterion="wanda", statistics=measured)
    assert all(
        torch.equal(is_zero(p), is_zero(q).cpu()) for p, q in zip(here.parameters(), there.parameters(), strict=True)
    )


def test_rows_of_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(37, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
        on = w.cuda()
        secateur.prune(w, 0.47, pattern="row")
        secateur.prune(on, 0.47, pattern="row")
        assert torch.equal(w, on.cpu())


def test_an_error_leaves_all_as_before() -> None:
    """Copies are held in the machine's own memory, and put back."""
    model = mlp().cuda()
    before = copy.deepcopy(model.state_dict())
    calls: list[str] = []

    def solver(weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str) -> Any:
        assert weight.is_cuda and hessian.is_cuda
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        new, mask, error, damping = choosing(
            weight.cpu(), hessian=hessian.cpu(), pattern=pattern, count=count, name=name
        )
        return new.cuda(), mask.cuda(), error, damping

    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, 0.5, solver=solver, calibration=batches())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bit_inputs_and_under_autocast(dtype: torch.dtype) -> None:
    """Summed in float32, without TF32 even where it is allowed."""
    model, x = nn.Sequential(nn.Linear(64, 32)).cuda(), torch.randn(512, 64, device="cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:

        def forward(m: nn.Module, b: Tensor) -> None:
            with torch.autocast("cuda", dtype):
                m(b)

        found = secateur.calibrate(model, secateur.Calibration([x], forward=forward), "hessian")["0.weight"]["hessian"]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = 2 / 512 * x.double().T @ x.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    low = nn.Sequential(nn.Linear(64, 32)).cuda().to(dtype)
    assert secateur.prune(low, 0.5, solver="sparsegpt", calibration=[x.to(dtype)]).sparsity == 0.5
