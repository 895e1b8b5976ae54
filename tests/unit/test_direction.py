"""Which way of a metric is better, and whether a model is still the same one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import BadInput
from secateur.evaluate.direction import HIGHER, LOWER, higher_is_better
from secateur.evaluate.fingerprint import digest, sums_of


@pytest.mark.parametrize(
    ("name", "up"),
    [
        ("accuracy", True), ("top-1 acc", True), ("Test Accuracy (%)", True), ("agreement", True), ("macro F1", True),
        ("spearman", True), ("ROC-AUC", True), ("loss", False), ("val_loss", False), ("perplexity", False),
        ("top-1 error", False), ("KL", False), ("cross-entropy", False), ("wikitext ppl", False), ("mse", False),
    ],
)  # fmt: skip
def test_names_that_say_it(name: str, up: bool) -> None:
    assert higher_is_better(name) is up
    assert higher_is_better(name, not up) is not up  # what is asked comes first


@pytest.mark.parametrize("name", ["", "gain", "lossless", "accurate", "accuracy loss", "accuracy drop", "glue"])
def test_names_that_do_not(name: str) -> None:
    with pytest.raises(BadInput, match=r"higher_is_better=True .*higher_is_better=False"):
        higher_is_better(name)


def test_no_word_says_both() -> None:
    assert not HIGHER & LOWER


def test_every_byte_and_type_counts() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).to(torch.bfloat16))
    before = sums_of(model)
    assert sums_of(model) == before and before.keys() == model.state_dict().keys()
    for name, change in {
        "0.weight": lambda: model[0].weight.data[1, 2].neg_(),
        "1.running_var": lambda: model[1].running_var.mul_(2),
        "2.bias": lambda: setattr(model[2].bias, "data", model[2].bias.data.half()),
        "0.bias": lambda: setattr(model[0].bias, "data", model[0].bias.data.view(2, 1)),
    }.items():
        change()
        after = sums_of(model)
        assert {n for n in before if before[n] != after[n]} == {name}
        assert digest(before) != digest(after) and len(digest(after)) == 16
        before = after


def test_strides_do_not() -> None:
    model = nn.Conv2d(3, 4, 2)
    before = sums_of(model)
    assert sums_of(model.to(memory_format=torch.channels_last)) == before
