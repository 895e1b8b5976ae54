"""Sensitivity: what is measured, what is not and why, what is put back, and what is said of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import BadInput, BadTensor, NotDefined, NothingChosen, SecateurWarning
from secateur.evaluate.sensitivity import SPARSITIES, sensitivity
from secateur.evaluate.sensitivity_facts import Sensitivity
from tests.contract.nets import snapshot

Evaluate = Callable[[nn.Module], dict[str, float]]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def distance(model: nn.Module) -> Evaluate:
    """How far the outputs are from those of the model as it is now."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    before = model(x).detach()
    return lambda m: {"mse": float((m(x) - before).square().mean()), "other": 1.0}


def refused(call: Callable[[], Any], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error and [w for w in words if w not in str(e.value)] == []


def zeros(model: nn.Module) -> dict[str, int]:
    return {n: int((p == 0).sum()) for n, p in model.named_parameters() if p.dim() > 1}


def seen(model: nn.Module, *args: Any, **more: Any) -> tuple[Sensitivity, list[dict[str, int]]]:
    """A scan, and the zeros in the model at each call of evaluate."""
    inner, counts = distance(model), []

    def evaluate(m: nn.Module) -> dict[str, float]:
        counts.append(zeros(m))
        return inner(m)

    return sensitivity(model, evaluate, *args, **more), counts


def test_one_layer_at_a_time_has_its_own_count_and_all_else_is_dense() -> None:
    model = net()
    scan, counts = seen(model, (0.35, 0.9))
    none = {"0.weight": 0, "2.weight": 0, "4.weight": 0}
    assert counts == [
        none,
        {**none, "0.weight": 45}, {**none, "0.weight": 115},
        {**none, "2.weight": 67}, {**none, "2.weight": 173},
        {**none, "4.weight": 17}, {**none, "4.weight": 43},
    ]  # fmt: skip
    assert [[p.zeros for p in layer.points] for layer in scan] == [[45, 115], [67, 173], [17, 43]]
    assert all(drop is not None and drop > 0 for row in scan.table() for drop in row["drops"].values())
    assert scan.metric == "mse" and not scan.higher_is_better and scan.baseline == 0.0
    assert scan.sparsities == (0.35, 0.9) and sensitivity(model, distance(model)).sparsities == SPARSITIES


def test_the_smallest_go_as_prune_would_take_them() -> None:
    model, kept = net(), []

    def evaluate(m: nn.Module) -> dict[str, float]:
        kept.append(m[2].weight != 0)  # type: ignore[index]
        return {"loss": 1.0}

    with pytest.warns(SecateurWarning, match="did not move"):
        sensitivity(model, evaluate, (0.7,), include="2")
    secateur.prune(model, 0.7, include="2")
    assert torch.equal(kept[1], model[2].weight != 0)


def test_everything_is_as_before_afterwards() -> None:
    model = nn.Sequential(net(), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    draw = torch.get_rng_state()

    def evaluate(m: nn.Module) -> dict[str, float]:
        assert not any(x.training for x in m.modules()) and not torch.is_grad_enabled()
        return {"loss": float(m(torch.ones(2, 8)).square().mean()) + float(torch.rand(()))}

    first = sensitivity(model, evaluate)
    assert snapshot(model) == before and [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads and torch.equal(torch.get_rng_state(), draw)
    assert sensitivity(model, evaluate) == first  # what evaluate draws is the same in every call


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_put_back_after_an_error(error: type[BaseException]) -> None:
    model, calls = net(), 0
    before = snapshot(model)

    def evaluate(m: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            assert snapshot(m) != before
            raise error("in the middle")
        return {"loss": float(calls)}

    model.train()
    with pytest.raises(error, match="in the middle"):
        sensitivity(model, evaluate)
    assert snapshot(model) == before and model.training and model[0].training


def test_an_evaluate_that_moves_the_weights_elsewhere_gets_them_back_all_the_same() -> None:
    model = net()
    before, inner = snapshot(model), distance(model)

    def evaluate(m: nn.Module) -> dict[str, float]:
        for p in m.parameters():
            p.data = p.data.clone()  # as .to(device) does
        return inner(m)

    sensitivity(model, evaluate)
    assert snapshot(model) == before


def test_an_evaluate_that_trains_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def evaluate(m: nn.Module) -> dict[str, float]:
        m.train()
        return {"loss": float(m(torch.randn(6, 8)).mean())}

    with pytest.raises(BadInput, match=r"evaluate changed the model: 1\.running_mean"):
        sensitivity(model, evaluate)


def test_where_nothing_is_pruned_nothing_is_measured_and_no_layer_is_called_robust() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight[:8] = 0  # two thirds
    scan, counts = seen(model, (0.001, 0.5, 0.9))
    assert [[p.why for p in layer.points] for layer in scan] == [
        ["wholly zero before"] * 3,
        [
            "0.001 of 192 weights rounds to none",
            "already sparser: 128 of 192 weights are zero, and 96 were asked for",
            None,
        ],
        ["0.001 of 48 weights rounds to none", None, None],
    ]
    assert len(counts) == 1 + 3 and [layer.measured for layer in scan] == [False, True, True]
    assert scan.drop("0.weight", 0.9) is None and scan.drop("2.weight", 0.5) is None
    told = "\n".join(scan.answers(0.9))
    assert "First layer 0.weight: not measured at 90% (wholly zero before)." in told
    assert "Not measured, which says nothing of how robust they are: 0.weight (wholly zero before)." in told
    assert "0.weight" not in told.split("Least sensitive")[1].split("\n")[0]
    assert "not measured: wholly zero before" in str(scan)
    with torch.no_grad():
        model[2].weight.zero_()
        model[4].weight.zero_()
    with pytest.raises(NothingChosen, match="nothing was pruned in any layer"):
        sensitivity(model, lambda m: {"loss": 1.0})


def test_what_cannot_carry_the_pattern_is_there_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = sensitivity(model, lambda m: {"loss": float((m[1].weight == 0).sum())}, pattern="2:4")  # type: ignore[index]
    assert scan.sparsities == (0.5,)
    assert scan["0.weight"].points == () and "cannot carry 2:4" in str(scan["0.weight"].reason)
    assert scan["1.weight"].points[0].zeros == 32 and scan.drop("1.weight", 0.5) == 32
    with pytest.raises(NotDefined, match="fixes how many"):
        scan.allocation(0.5)


def test_channels_take_their_bias_along_and_bring_it_back() -> None:
    model = net()
    before, inner, biases = snapshot(model), distance(model), []

    def evaluate(m: nn.Module) -> dict[str, float]:
        biases.append(int((m[2].bias == 0).sum()))  # type: ignore[index]
        return inner(m)

    scan = sensitivity(model, evaluate, (0.5, 0.9), pattern="channel", include="2")
    assert biases == [0, 6, 10] and snapshot(model) == before
    assert [p.zeros for p in scan["2.weight"].points] == [96, 160]  # whole channels only: 173 were asked for
    few = sensitivity(model, inner, (0.05, 0.5), pattern="channel", include="2")
    assert few["2.weight"].points[0].why == "no further whole channel goes at 10 of 192 weights"


def test_a_group_is_pruned_together() -> None:
    scan, counts = seen(net(), (0.5,), groups={"ends": ["0", "4.weight"]})
    assert [(layer.name, [p.name for p in layer.pieces]) for layer in scan] == [
        ("ends", ["0.weight", "4.weight"]), ("2.weight", ["2.weight"]),
    ]  # fmt: skip
    assert counts[1] == {"0.weight": 64, "2.weight": 0, "4.weight": 24} and scan["ends"].points[0].zeros == 88
    assert scan["4.weight"] is scan["ends"]


def test_a_tied_weight_is_one_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    model = Tied()
    scan, counts = seen(model, (0.5,))
    assert [layer.name for layer in scan] == ["a.weight"] and scan["b.weight"] is scan["a.weight"]
    assert counts == [{"a.weight": 0}, {"a.weight": 32}] and model.b.weight is model.a.weight
    assert "tied: b.weight" in str(scan)
    assert scan.allocation(0.5).counts == {"a.weight": 32}


def test_a_number_that_is_not_finite_is_recorded_and_the_worst() -> None:
    model = net()
    values = iter([90.0, 80.0, math.nan, 70.0, math.inf, 88.0, -math.inf])
    scan = sensitivity(model, lambda m: {"accuracy": next(values)}, (0.5, 0.9))
    assert [scan.drop(layer, 0.9) for layer in scan] == [math.inf] * 3
    assert math.isnan(scan["0.weight"].points[1].metrics["accuracy"])
    assert scan.answers(0.9)[0] == "First layer 0.weight: accuracy is not finite at 90%, the worst there is."
    again = Sensitivity.from_json(scan.to_json())
    assert again.to_json() == scan.to_json() and [again.drop(x, 0.9) for x in again] == [math.inf] * 3
    curve = scan.curve(scan["0.weight"])
    assert curve.zeros == (0, 64) and curve.loss == (0.0, 10.0)  # an allocation does not go there


def test_answers_hold_the_ends_against_the_median() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    drops = [9.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.5]
    values = iter([50.0, *(v for d in drops for v in (50.0 - d / 10, 50.0 - d))])
    scan = sensitivity(model, lambda m: {"accuracy": next(values)}, (0.5, 0.75))
    assert scan.answers() == [
        "First layer 0.weight: accuracy falls by 9.00 at 75%, 9.0 times the median layer's 1.00.",
        "Last layer 7.weight: accuracy falls by 0.50 at 75%, 0.5 times the median layer's 1.00.",
        "Early layers, the first 2 of 8: at their median accuracy falls by 6.00 at 75%, 6.0 times the median layer's 1.00.",
        "Most sensitive at 75%: 0.weight (9.00), 1.weight (3.00), 4.weight (2.00) and 2.weight (1.00).",
        "Least sensitive at 75%: 7.weight (0.50), 6.weight (1.00), 5.weight (1.00) and 3.weight (1.00).",
    ]
    assert scan.answers(0.5)[0].startswith("First layer 0.weight: accuracy falls by 0.90 at 50%, 9.0 times")
    with pytest.raises(BadInput, match=r"has the sparsities 0\.5, 0\.75; got 0\.6"):
        scan.answers(0.6)
    with pytest.raises(BadInput, match=r"got 0\.6"):
        scan.drop("0.weight", 0.6)
    with pytest.raises(KeyError):
        scan["8.weight"]


def test_a_layer_that_moves_nothing_is_named_and_not_called_the_least_sensitive() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.more, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.more(self.used(x))
            return out

    model = Spare()
    said = sensitivity(model, distance(model)).answers()
    assert "Moved nothing at any sparsity: spare.weight. See that the network uses them." in said
    assert not any("spare" in s for s in said if s.startswith("Least"))


def test_which_way_is_better() -> None:
    values = [1.0, 2.0, 3.0, 4.0]

    def scan(metric: str, **more: Any) -> float | None:
        found = iter(values)
        return sensitivity(net(), lambda m: {metric: next(found)}, (0.5,), **more).drop("0.weight", 0.5)

    assert scan("val_loss") == 1.0 and scan("top-1 accuracy") == -1.0
    assert scan("gain", higher_is_better=True) == -1.0 and scan("accuracy", higher_is_better=False) == 1.0
    refused(
        lambda: scan("gain"), BadInput, "'gain'", "does not tell", "higher_is_better=True", "higher_is_better=False"
    )
    refused(lambda: scan("accuracy loss"), BadInput, "says both")
    refused(lambda: scan("loss", higher_is_better=1), BadInput, "True, False or None", "1")


def test_one_number_without_a_name() -> None:
    def scan(**more: Any) -> Sensitivity:
        values = iter([0.9, 0.8, 0.7, 0.6])
        return sensitivity(net(), lambda m: torch.tensor(next(values)), (0.5,), **more)

    assert scan(metric="f1").metric == "f1" and scan(higher_is_better=True).metric == "metric"
    refused(scan, BadInput, "does not tell", "higher_is_better=True")


def test_a_metric_that_does_not_move_may_hide_damage() -> None:
    with pytest.warns(SecateurWarning, match="accuracy did not move at all.*may hide damage"):
        scan = sensitivity(net(), lambda m: {"accuracy": 1.0})
    assert scan.still and "did not move at all" in scan.answers()[-1]


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a state": (lambda: sensitivity(net().state_dict(), print), BadInput, ("module", "OrderedDict")),  # type: ignore[arg-type]
    "no function": (lambda: sensitivity(net(), "accuracy"), BadInput, ("'accuracy'",)),  # type: ignore[arg-type]
    "no sparsity": (lambda: sensitivity(net(), distance(net()), ()), BadInput, ("sparsities",)),
    "a number": (lambda: sensitivity(net(), distance(net()), 0.5), BadInput, ("0.5",)),  # type: ignore[arg-type]
    "zero": (lambda: sensitivity(net(), distance(net()), (0.0, 0.5)), BadInput, ("above 0",)),
    "twice": (lambda: sensitivity(net(), distance(net()), (0.5, 0.5)), BadInput, ("once",)),
    "per cent": (lambda: sensitivity(net(), distance(net()), (50,)), BadInput, ("Did you mean 0.5",)),
    "of a pattern": (lambda: sensitivity(net(), distance(net()), (0.7,), pattern="2:4"), NotDefined, ("2:4 means sparsity 0.5",)),
    "a filter": (lambda: sensitivity(net(), distance(net()), include="conv*"), NothingChosen, ("conv*",)),
    "a group of nothing": (lambda: sensitivity(net(), distance(net()), groups={"g": "conv"}), NothingChosen, ("'conv'", "'g'")),
    "two groups": (
        lambda: sensitivity(net(), distance(net()), groups={"g": "0", "h": "*"}), BadInput, ("'0.weight'", "'g' and 'h'"),
    ),
    "a group's name": (lambda: sensitivity(net(), distance(net()), groups={"0.weight": "2"}), BadInput, ("call the group",)),
    "a list of groups": (lambda: sensitivity(net(), distance(net()), groups=["0"]), BadInput, ("groups maps",)),  # type: ignore[arg-type]
    "another metric": (lambda: sensitivity(net(), distance(net()), metric="f1"), BadInput, ("'f1'", "'mse', 'other'")),
    "a text for a number": (lambda: sensitivity(net(), lambda m: {"loss": "low"}), BadInput, ("names to numbers",)),
    "no metric": (lambda: sensitivity(net(), lambda m: {}), BadInput, ("no metric",)),
    "a broken network": (lambda: sensitivity(net(), lambda m: {"loss": math.nan}), BadInput, ("loss", "nan", "as it came")),
    "a seed": (lambda: sensitivity(net(), distance(net()), seed=True), BadInput, ("seed",)),
}  # fmt: skip


@pytest.mark.parametrize("slip", REFUSED)
def test_refused(slip: str) -> None:
    call, error, words = REFUSED[slip]
    refused(call, error, *words)


def test_bad_weights_are_refused_before_anything_is_measured() -> None:
    def never(m: nn.Module) -> dict[str, float]:
        raise AssertionError("measured")

    model = net()
    model[4].weight.data[0, 0] = math.nan
    with pytest.raises(BadTensor, match=r"4\.weight"):
        sensitivity(model, never)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].bias = shared[0].bias
    with pytest.raises(BadTensor, match="belongs to two layers"):
        sensitivity(shared, never, pattern="channel")
    with pytest.raises(BadInput, match="does not tell"):
        sensitivity(net(), never, metric="gain")


def test_a_metric_that_goes_missing_is_named() -> None:
    found = iter([{"loss": 1.0}, {"lost": 1.0}])
    model = net()
    before = snapshot(model)
    with pytest.raises(BadInput, match="no metric 'loss'; there are 'lost'"):
        sensitivity(model, lambda m: next(found))
    assert snapshot(model) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"secateur_sensitivity": 1}', '{"secateur_sensitivity": 9}', "null"])
def test_texts_that_are_no_scan(text: str) -> None:
    with pytest.raises(BadInput, match=r"not a sensitivity scan|version 9"):
        Sensitivity.from_json(text)
