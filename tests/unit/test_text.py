"""Texts cut into sequences of tokens, and perplexity against its formula."""

from __future__ import annotations

import itertools
import math
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import BadInput
from secateur.evaluate.text import perplexity, read_text, sequences

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def letters(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]


class Bigram(nn.Module):
    """Logits of the next token from a table, in a dtype, as one of the things models return."""

    def __init__(self, size: int = 26, dtype: torch.dtype = torch.float32, how: str = "tensor") -> None:
        super().__init__()
        self.table = nn.Embedding(size, size, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.how = how

    def forward(self, tokens: Tensor) -> Any:
        logits = self.drop(self.table(tokens))
        return {"tensor": logits, "tuple": (logits, None), "attribute": SimpleNamespace(logits=logits)}[self.how]


# Sequences


def test_chunks_do_not_overlap_and_nothing_is_left_out_but_the_end() -> None:
    found = sequences(letters, ALPHABET, length=4, start=3)
    assert sorted(int(s[0, 0]) for s in found) == [3, 7, 11, 15, 19]
    for s in found:
        assert s.shape == (1, 4) and s.dtype is torch.int64
        assert torch.equal(s[0] - s[0, 0], torch.arange(4))


def test_the_seed_decides_and_more_begin_with_the_same() -> None:
    text = ALPHABET * 20
    a, b, c = (sequences(letters, text, length=5, count=12, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    more = sequences(letters, text, length=5, count=30, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a, more, strict=False))
    state = torch.get_rng_state()
    sequences(letters, text, length=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_they_come_in_order() -> None:
    found = torch.cat(sequences(letters, ALPHABET, length=6, count=3, seed=None, start=2))
    assert torch.equal(found, torch.arange(2, 20).view(3, 6))


@pytest.mark.parametrize(
    "returned",
    [lambda t: t, tuple, torch.tensor, lambda t: torch.tensor([t]), lambda t: {"input_ids": t}, lambda t: {"input_ids": [t]},
     lambda t: UserDict(input_ids=torch.tensor([t], dtype=torch.int32))],
    ids=["list", "tuple", "tensor", "batch", "mapping", "batch in a mapping", "other mapping, int32"],
)  # fmt: skip
def test_what_tokenizers_return(returned: Any) -> None:
    (found,) = sequences(lambda text: returned(letters(text)), "secateurs", length=9)
    assert found.dtype is torch.int64 and found[0].tolist() == letters("secateurs")


def test_the_sequences_are_their_own() -> None:
    tokens = torch.arange(26)
    sequences(lambda _: tokens, "a", length=13)[0].zero_()
    assert torch.equal(tokens, torch.arange(26))


@pytest.mark.parametrize(("arguments", "says"), [
    ({"text": ""}, "the text is empty"),
    ({"text": " \n"}, "the text is empty"),
    ({"text": ["a", "b"]}, "text is a list: give one string"),
    ({"count": 7}, "7 sequences of 4 tokens need 28 tokens, and it has 26. .* ask for at most 6 sequences"),
    ({"count": 6, "start": 3}, "6 sequences of 4 tokens from token 3 on need 27 .* at most 5 sequences"),
    ({"length": 27}, "1 sequences of 27 tokens need 27 tokens, and it has 26. .* ask for shorter sequences"),
    ({"start": 30}, "has 26"),
    ({"length": 1}, "length=1: give a whole number of at least 2"),
    ({"length": 4.0}, "length=4.0"),
    ({"count": 0}, "count=0: give a whole number of at least 1"),
    ({"count": True}, "count=True"),
    ({"start": -1}, "start=-1: give a whole number of at least 0"),
    ({"seed": 0.5}, "seed=0.5: give a whole number"),
    ({"tokenizer": str.split}, "the tokenizer returned list"),
    ({"tokenizer": lambda _: [0.5] * 26}, "the tokenizer returned torch.float32 of shape"),
    ({"tokenizer": lambda _: [[0] * 13] * 2}, r"the tokenizer returned torch.int64 of shape \(2, 13\)"),
    ({"tokenizer": lambda _: []}, "it has 0"),
])  # fmt: skip
def test_bad_sequences(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        sequences(**{"tokenizer": letters, "text": ALPHABET, "length": 4, **arguments})


# Perplexity


@pytest.mark.parametrize("how", ["tensor", "tuple", "attribute"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_is_its_formula(how: str, batch: int) -> None:
    model, ids = Bigram(how=how), torch.randint(0, 26, (3, 7))
    logs = torch.log_softmax(model.table.weight.detach().double(), 1)
    mean = -sum(float(logs[a, b]) for row in ids.tolist() for a, b in itertools.pairwise(row)) / (3 * 6)
    assert perplexity(model, list(ids.split(1)), batch=batch) == pytest.approx(math.exp(mean), rel=1e-6)
    assert perplexity(model, ids, batch=batch) == perplexity(model, ids.int().split(2), batch=batch)


def test_the_loss_is_float32_in_any_dtype() -> None:
    half, ids = Bigram(dtype=torch.bfloat16), torch.randint(0, 26, (2, 9))
    single = Bigram()
    single.table.weight.data = half.table.weight.data.float()
    assert perplexity(half, ids) == perplexity(single, ids)


def test_the_model_is_left_as_it_was() -> None:
    model = Bigram().train()
    model.drop.eval()
    state = torch.get_rng_state()
    ids = torch.randint(0, 26, (2, 9), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, ids) == perplexity(model, ids)
    assert (model.training, model.table.training, model.drop.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.table.weight.grad is None
    with pytest.raises(IndexError):
        perplexity(model, ids + 26)
    assert (model.training, model.drop.training) == (True, False)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    perplexity(Bigram(), torch.zeros(5, 3, dtype=torch.long), batch=2, progress=lambda *p: told.append(p))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_network_that_is_broken_has_no_finite_perplexity() -> None:
    ids = torch.tensor([[0, 1, 2]])
    model = Bigram()
    with torch.no_grad():
        model.table.weight.fill_(0)
        model.table.weight[0, 5] = 1e30
    assert perplexity(model, ids) == math.inf
    with torch.no_grad():
        model.table.weight[0, 5] = math.nan
    assert math.isnan(perplexity(model, ids))


class Configured(Bigram):
    config = SimpleNamespace(max_position_embeddings=8, vocab_size=26)


class Classifier(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens), 2)


IDS = torch.zeros(2, 8, dtype=torch.long)


@pytest.mark.parametrize(("model", "ids", "more", "says"), [
    (Bigram, [], {}, "there is no sequence"),
    (Bigram, IDS[:0], {}, "there is no sequence"),
    (Bigram, IDS[:, :0], {}, "there is no sequence"),
    (Bigram, IDS[:, :1], {}, r"lengths \[1\]: give one length of at least 2"),
    (Bigram, [IDS, IDS[:, :5]], {}, r"lengths \[5, 8\]"),
    (Bigram, list(IDS), {}, r"a sequence is \(8,\) of torch.int64"),
    (Bigram, IDS.float(), {}, r"a sequence is \(2, 8\) of torch.float32"),
    (Bigram, ["a"], {}, "a sequence is str"),
    (Bigram, IDS, {"batch": 0}, "batch=0"),
    (Bigram, IDS, {"batch": True}, "batch=True"),
    (Configured, IDS.repeat(1, 2), {}, "have 16 tokens, and the model's context ends at 8"),
    (Configured, IDS + 26, {}, "run from 26 to 26, and the model's vocabulary from 0 to 25"),
    (Configured, IDS - 1, {}, "run from -1 to -1"),
    (Classifier, IDS, {}, r"the model returned shape \(1, 2\) for tokens of shape \(1, 8\)"),
    (lambda: nn.Embedding(8, 5), IDS + 7, {}, "run from 7 to 7, and the model's vocabulary from 0 to 4"),
])  # fmt: skip
def test_bad_perplexity(model: Any, ids: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        perplexity(model(), ids, **more)


# Files


def test_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\nzeilen".encode())
    (tmp_path / "a.txt").write_text("eins", "utf-8")
    (tmp_path / "c.md").write_text("no", "utf-8")
    assert read_text(tmp_path) == "eins\n\nzwei\nzeilen"
    assert read_text(str(tmp_path / "b.txt")) == "zwei\nzeilen"
    assert read_text([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == "zwei\nzeilen\n\neins"


def test_files_that_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    for paths, says in (
        (tmp_path / "latin.txt", r"latin\.txt is not UTF-8 \(byte 3\)"),
        (tmp_path / "empty.txt", r"empty\.txt: there is nothing but white space"),
        (tmp_path / "none.txt", r"none\.txt cannot be read: No such file"),
        (tmp_path / "folder", r"folder holds no \*\.txt"),
        ([], "no path was given"),
    ):
        with pytest.raises(BadInput, match=says):
            read_text(paths)
