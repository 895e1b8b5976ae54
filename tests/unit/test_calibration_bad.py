"""Everything that can be wrong about data: refused by name, and every weight is as before; or told in one warning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import BadInput, Calibration, NotDefined
from secateur.errors import BadTensor, Infeasible, NothingChosen, SecateurWarning
from tests.unit.calibrating import batches, choosing, correlated, mlp, moving, refused

X = batches()


class Cnn(nn.Module):
    """No list of layers: a user must say what the blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


def used_up() -> Any:
    loader = iter(X)
    list(loader)
    return loader


NAN = [X[0], torch.full((4, 12), math.nan, dtype=torch.float64)]
INF = [X[0], torch.full((4, 12), math.inf, dtype=torch.float64)]
CALIBRATIONS: dict[str, tuple[Any, str]] = {
    "no batch": ([], r"the calibration is empty.*Was its loader used up before\?"),
    "a loader that is used up": (used_up, "the calibration is empty"),
    "a tensor": (X[0], r"takes batches of input.*got a Tensor\. For a single batch pass \[batch\]"),
    "a mapping": ({"x": X[0]}, r"got a dict\. For a single batch"),
    "a text": ("The ship", "got a str"),
    "a number": (3, "got a int"),
    "NaN": (NAN, r"the inputs of '0.weight'.* hold NaN or infinite values: a calibration batch"),
    "infinity": (INF, "the inputs of '0.weight'.* hold NaN or infinite"),
    "batches of objects": ([object()], r"a batch is a object: give forward=, a function of model and batch"),
    "an empty tuple": ([()], "a batch is a tuple: give forward="),
    "a loss that is no function": (Calibration(X, loss=3), "Calibration: loss is a function; got 3"),  # type: ignore[arg-type]
    "a forward that is none": (Calibration(X, forward="model"), "Calibration: forward is a function"),  # type: ignore[arg-type]
    "progress that is none": (Calibration(X, progress=True), "Calibration: progress is a function"),  # type: ignore[arg-type]
    "blocks of another kind": (Calibration(X, blocks=3), 'blocks is "auto", "layers", "whole".*got 3'),  # type: ignore[arg-type]
    "no block": (Calibration(X, blocks=[]), r"blocks is .*got \[\]"),
    "blocks by module": (Calibration(X, blocks=[nn.ReLU()]), "blocks is .*a list of names"),  # type: ignore[list-item]
    "a block of another model": (
        Calibration(X, blocks=["0", "encoder"]),
        "'encoder' is no module of this model; it has 0, 1, 2",
    ),
    "children of another model": (
        Calibration(X, blocks="encoder.layers"),
        "'encoder.layers' is no module of this model",
    ),
    "a block without children": (Calibration(X, blocks="0"), "this Linear has no children that could be blocks"),
    "blocks out of order": (
        Calibration(X, blocks=["2", "0"]),
        r"'0' runs out of turn.*Name them, in the order they run",
    ),
    "blocks with a gap": (
        Calibration(X, blocks=["0", "4"]),
        "'4' does not get what '0' returned, so pruned outputs cannot be fed",
    ),
    "one in another": (Calibration(X, blocks=["0", "0"]), "does not run on a calibration batch|runs out of turn"),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_what_is_no_calibration(case: str) -> None:
    calibration, text = CALIBRATIONS[case]
    refused(BadInput, text, mlp(), calibration=calibration() if callable(calibration) else calibration)


@pytest.mark.parametrize(
    "case", ["no batch", "a tensor", "NaN", "a text", "batches of objects", "a loader that is used up"]
)
@pytest.mark.parametrize("how", ["one go", "solver", "outliers", "calibrate"])
def test_it_is_refused_by_whatever_uses_it(case: str, how: str) -> None:
    calibration, text = CALIBRATIONS[case]
    calibration = calibration() if callable(calibration) else calibration
    if how == "calibrate":
        with pytest.raises(BadInput, match=text):
            secateur.calibrate(mlp(), calibration)
        return
    more: dict[str, Any] = {"one go": {"pattern": "unstructured", "allocation": "global"}, "outliers": {"allocation": "owl"},
                            "solver": {"criterion": "magnitude", "solver": choosing}}[how]  # fmt: skip
    refused(BadInput, text, mlp(), calibration=calibration, **more)


class Odd(nn.Module):
    """A block that returns, or is called with, something else than a tensor."""

    def __init__(self, out: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(12, 12).double(), out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x))


ODD: dict[str, tuple[nn.Module, str]] = {
    "returns nothing": (nn.Sequential(Odd(lambda y: None), nn.Identity()), "'1' gets a NoneType where its hidden states"),
    "returns a text": (nn.Sequential(Odd(lambda y: "text"), nn.Identity()), "'1' gets a str where its hidden states"),
    "returns an empty tuple": (nn.Sequential(Odd(lambda y: ()), nn.Identity()), "'1' gets a tuple where"),
    "gets a tuple": (nn.Sequential(Odd(lambda y: (y, y)), Odd(lambda y: y[0])), "'1' gets a tuple where its hidden"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_blocks_that_do_not_pass_on_tensors(case: str) -> None:
    model, text = ODD[case]
    refused(BadInput, text, model, calibration=X)


def test_a_model_whose_blocks_cannot_be_found() -> None:
    images = [torch.randn(4, 3, 8, 8)]
    text = r"the blocks of this Cnn cannot be found.*Name them, in the order they run.*blocks=\[.*blocks=\"layers\".*\"whole\""
    refused(BadInput, text, Cnn(), calibration=images)
    refused(
        BadInput, "does not get what 'stem' returned", Cnn(), calibration=Calibration(images, blocks=["stem", "body"])
    )
    model = Cnn()
    assert (
        secateur.prune(model, 0.5, criterion="wanda", calibration=Calibration(images, blocks="whole")).sparsity == 0.5
    )


def test_a_block_that_does_not_run() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(12, 12).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    refused(BadInput, "'layers.2' does not run on a calibration batch", Skips(), calibration=X)


def test_a_layer_that_no_batch_reaches() -> None:
    class Branches(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(12, 12).double())
            self[0].register_module("unused", nn.Linear(5, 5).double())

    text = r"no calibration batch reached '0.unused.weight'.*Leave it out with ignore=, or calibrate with batches that use it"
    refused(BadInput, text, Branches(), calibration=X)
    assert secateur.prune(Branches(), 0.5, criterion="wanda", calibration=X, ignore="*unused").zeros == 72


def test_a_weight_that_is_multiplied_in_another_way() -> None:
    class By(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    text = "no calibration batch reached '0.weight'.*does not multiply as linear layers"
    refused(BadInput, text, nn.Sequential(By(12, 4).double()), calibration=X)


def test_a_role_that_is_not_how_the_layer_multiplies() -> None:
    text = r"'0.weight'.* is multiplied with 12 input features where the role 'linear_transposed' says 5: give its role"
    refused(
        BadInput, text, nn.Sequential(nn.Linear(12, 5).double()), calibration=X, roles={"0.weight": "linear_transposed"}
    )


def test_nothing_that_can_be_observed() -> None:
    model = nn.Sequential(nn.LSTM(12, 8).double())
    refused(
        NothingChosen,
        "no tensor can be pruned with this calibration: .*role recurrent cannot be observed",
        model,
        calibration=X,
    )


NO_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "a criterion": ({}, r"'wanda' is made of what data tells \(input_norm\): pass calibration="),
    "a solver": ({"criterion": "magnitude", "solver": choosing}, "choosing works on what data tells of each layer: pass"),
    "outliers": ({"criterion": "magnitude", "allocation": "owl"}, "OWL looks at the inputs of layers: pass calibration="),
    "a function": ({"criterion": lambda weight, *, grad: weight}, "asks for 'grad', which is not provided here"),
    "statistics for a solver": ({"solver": moving, "statistics": {}}, "works on what data tells of each layer"),
    "both": ({"calibration": X, "statistics": {}}, "are two answers to one question: give one of them"),
    "batches as statistics": ({"statistics": X}, r"statistics is what .*got a list\. Batches of input go into"),
    "tensors as statistics": ({"statistics": {"0.weight": X[0]}}, r"is what secateur.calibrate returns.*got a Tensor"),
    "outliers from statistics": ({"allocation": "owl", "statistics": {}}, "OWL looks at the blocks of a model"),
    "statistics without a use": ({"criterion": "magnitude", "statistics": {}}, "go with a criterion that asks for some"),
    "data without a use": ({"criterion": "magnitude", "calibration": X}, "needs data: the criterion is magnitude, and"),
    "a statistic that nobody measures": (
        {"criterion": lambda weight, *, curvature: weight, "calibration": X},
        r"asks for 'curvature', which calibration does not measure; it knows input_norm",
    ),
    "an unknown solver": ({"solver": "sparse-gpt", "calibration": X}, r"solver must be one of .*got 'sparse-gpt'"),
    "a solver that asks for nothing": ({"solver": lambda weight: weight, "calibration": X}, "asks for none of hessian"),
    "a solver that asks for what there is not": (
        {"solver": lambda weight, *, hessian, learning_rate: weight, "calibration": X},
        "asks for learning_rate, which nobody provides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_DATA)
def test_data_and_what_needs_it_go_together(case: str) -> None:
    how, text = NO_DATA[case]
    refused(BadInput, text, mlp(), **how)


def test_statistics_of_other_tensors() -> None:
    model, measured = mlp(), secateur.calibrate(mlp(), X)
    wrong = {**measured, "2.weight": {"input_norm": torch.ones(7)}}
    text = r"of 7 input features do not belong to a weight of the shape \(16, 20\)"
    refused(BadInput, text, model, statistics=wrong)
    less = {n: s for n, s in measured.items() if n != "4.weight"}
    refused(BadInput, "needs 'input_norm' of '4.weight', which the statistics do not have", model, statistics=less)
    grad = {n: {"grad": torch.ones(3)} for n in measured}
    text = r"'grad' of '0.weight' has the shape \(3,\), the weight \(20, 12\)"
    refused(BadInput, text, model, criterion="taylor", statistics=grad)
    nan = {n: {"input_norm": s["input_norm"] * math.nan} for n, s in measured.items()}
    refused(BadTensor, "the criterion returned NaN", model, statistics=nan)
    with pytest.raises(BadInput, match=r"calibrate knows the statistics input_norm, .*got 'norm'"):
        secateur.calibrate(model, X, ["norm"])


def test_targets_that_cannot_be_run() -> None:
    state = mlp().state_dict()
    for target, name in ((state, "OrderedDict"), (state["0.weight"], "Tensor")):
        with pytest.raises(BadInput, match=f"a {name} cannot be run: load it and pass the nn.Module"):
            secateur.prune(target, 0.5, criterion="wanda", calibration=X)
    with pytest.raises(BadInput, match="is a path: say where the result goes with out="):
        secateur.prune("model", 0.5, criterion="wanda", calibration=X)


def test_fewer_inputs_than_features_are_told_once() -> None:
    model = mlp()
    few = [correlated(7, 12, dtype=torch.float64), correlated(6, 12, seed=1, dtype=torch.float64)]
    text = r"fewer inputs .* the Hessians of 3 layers \(2.weight: 13 of 20, 4.weight: 13 of 16, 6.weight: 13 of 16\)"
    with pytest.warns(SecateurWarning, match=text) as seen:
        report = secateur.prune(model, 0.5, solver=choosing, calibration=few)
    assert len(seen) == 1 and seen[0].filename == __file__ and len(report.warnings) == 1
    with pytest.warns(SecateurWarning, match="Hessians of 3 layers"):
        secateur.calibrate(mlp(), few, ["hessian"])
    secateur.prune(mlp(), 0.5, criterion="wanda", calibration=few)  # norms need no more


def test_groups_that_do_not_divide() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 4)).double()
    with pytest.warns(SecateurWarning, match="1 tensors cannot carry 2:4 and stay dense: 1.weight"):
        report = secateur.prune(model, criterion="wanda", pattern="2:4", calibration=X)
    assert report.total == 72 and report.zeros == 36 and len(report.warnings) == 1
    with pytest.raises(NotDefined, match=r"'1.weight'.* cannot be pruned in the pattern 2:4"):
        secateur.prune(model, criterion="wanda", pattern="2:4", calibration=X, include=["0.weight", "1.weight"])


def test_weights_that_are_not_finite_are_named_before_anything_runs() -> None:
    model = mlp()
    model[4].weight.data[2, 3] = math.nan
    ran: list[int] = []
    calibration = Calibration(X, forward=lambda m, b: ran.append(1))
    for how in ({}, {"solver": choosing, "criterion": "magnitude"}, {"allocation": "owl"}):
        refused(BadTensor, "'4.weight'.* holds 1 NaN or infinite weight", model, calibration=calibration, **how)
    assert not ran


def test_outliers_that_cannot_be_spread() -> None:
    for sparsity, limit in ((0.05, 0.08), (0.95, 0.2)):
        text = f"OWL spreads sparsities by {limit} around {sparsity}.*give a smaller limit"
        how = {"sparsity": sparsity, "allocation": secateur.OWL(outlier=1.5, limit=limit)}
        refused(Infeasible, text, mlp(), calibration=X, **how)
    odd: list[dict[str, Any]] = [{"outlier": v} for v in (0, True, math.nan, np.float32(2))]
    for more in [*odd, {"limit": 0.5}, {"limit": "0.1"}]:
        with pytest.raises(BadInput, match=r"OWL: (outlier|limit) is a number"):
            secateur.OWL(**more)
    refused(NotDefined, "max_sparsity and min_keep do not apply", mlp(), allocation="owl", min_keep=3, calibration=X)
