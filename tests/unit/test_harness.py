"""Tasks of lm-evaluation-harness as metrics; the real thing where it is installed, on a tiny model and data of our own."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import BadInput
from secateur.evaluate.harness import lm_eval_tasks
from secateur.recipe.load import check
from secateur.recipe.run import run

INSTALLED = importlib.util.find_spec("lm_eval") is not None
there = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_it_it_says_what_to_install() -> None:
    with pytest.raises(BadInput, match=r"pip install 'secateur\[lm-eval\]'"):
        lm_eval_tasks(nn.Linear(1, 1), None, ["hellaswag"])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<end>", "<unknown>", "red", "blue", "green", "sky", "grass", "is", "the"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unknown>")


def language_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def task(folder: Path) -> dict[str, Any]:
    lines = [("the sky is", 1), ("the grass is", 2), ("the sky the sky is", 0)]
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps({"question": q, "label": n}) + "\n" for q, n in lines))
    return {
        "task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": ["red", "blue", "green"],
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


def right(model: Any, words: Any) -> float:
    """The share of questions whose answer has the largest probability, by hand."""
    ids = {w: words.convert_tokens_to_ids(w) for w in ("red", "blue", "green")}
    hits = 0
    for question, label in (("the sky is", 1), ("the grass is", 2), ("the sky the sky is", 0)):
        logits: Tensor = model(**words(question, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        hits += int(logits[list(ids.values())].argmax()) == label
    return hits / 3


@there
@pytest.mark.filterwarnings("default")
def test_the_accuracy_of_a_task_is_that_by_hand(offline: Path) -> None:
    model, words = language_model().train(), tokenizer()
    torch.manual_seed(5)
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    found = lm_eval_tasks(model, words, [task(offline)], batch_size=2)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert found == {"colours acc": pytest.approx(right(model.eval(), words))}


@there
@pytest.mark.filterwarnings("default")
def test_a_yaml_file_is_a_task_and_data_may_hold_the_tokenizer(offline: Path) -> None:
    import yaml

    text = offline / "text.jsonl"
    text.write_text(json.dumps({"text": "the sky is blue the grass is green"}) + "\n")
    asked = {
        "task": "colours_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(text)}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    path = offline / "colours_text.yaml"
    path.write_text(yaml.safe_dump(asked))

    class Data:
        tokenizer = tokenizer()

    model = language_model().eval()
    found = lm_eval_tasks(model, Data(), [str(path)])
    ids = torch.tensor([[0, *Data.tokenizer("the sky is blue the grass is green")["input_ids"]]])
    loss = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])  # eight words, a token each
    assert found == {"colours_text word_perplexity": pytest.approx(math.exp(loss.item()), rel=1e-5)}


class Texts:
    """A sentence to learn, and the tokenizer beside it."""

    def __init__(self, seed: int) -> None:
        self.tokenizer = tokenizer()
        ids = self.tokenizer("the sky is blue the grass is green", return_tensors="pt")["input_ids"]
        self.batch = {"input_ids": ids, "labels": ids}
        self.test = [self.batch]

    def train(self, generator: torch.Generator) -> list[dict[str, Tensor]]:
        return [self.batch] * 4


@there
@pytest.mark.filterwarnings("default")
def test_a_recipe_is_scored_by_a_task(offline: Path) -> None:
    here = "tests.unit.test_harness"
    asked = {
        "name": "colours", "folder": str(offline / "run"), "data": f"{here}:Texts", "model": f"{here}:language_model",
        "train": {"epochs": 2}, "sparsities": [0.5], "methods": {"magnitude": {"prune": {}}},
        "evaluate": {"call": "secateur.evaluate.harness:lm_eval_tasks", "args": {"tasks": [task(offline)]}},
    }  # fmt: skip
    cells = run(check(asked))
    assert [list(c.metrics) for c in cells] == [["colours acc"]] * 2 and cells[1].flops


@there
@pytest.mark.filterwarnings("default")
def test_what_cannot_be_meant_is_refused(offline: Path) -> None:
    model, words = language_model(), tokenizer()
    for tasks in ([], "hellaswag"):
        with pytest.raises(BadInput, match="tasks is a list of names"):
            lm_eval_tasks(model, words, tasks)
    with pytest.raises(BadInput, match="a tokenizer is needed"):
        lm_eval_tasks(model, object(), ["hellaswag"])
    with pytest.raises(BadInput, match=r"does not know a task: .*no_such_task"):
        lm_eval_tasks(model, words, ["no_such_task"])
