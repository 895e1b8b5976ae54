"""Batches of texts, tokenised when they are asked for; MNLI from a local folder, for BERT-base."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.published.models import classifier

LABELS = ("entailment", "neutral", "contradiction")
"""In the order that GLUE numbers them."""
FILES = {
    "train": ("train.tsv", "multinli_1.0_train.jsonl"),
    "dev": ("dev_matched.tsv", "multinli_1.0_dev_matched.jsonl"),
}
"""Of each part, as GLUE and as the authors of MNLI distribute it."""


class Batches:
    """Batches that are made one by one when they are asked for, the same every time."""

    def __init__(self, chunks: Sequence[Tensor], make: Callable[[list[int]], Any]) -> None:
        self._chunks, self._make = chunks, make

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Any]:
        return (self._make(chunk.tolist()) for chunk in self._chunks)


class Pair(NamedTuple):
    """Two sentences and what the first says of the second, a number of `LABELS`."""

    premise: str
    hypothesis: str
    label: int


@dataclass(frozen=True)
class Mnli:
    """MNLI's training part, and the matched development part, which is only scored."""

    pairs: Sequence[Pair]
    scored: Sequence[Pair]
    tokenizer: Any
    batch: int
    length: int

    def train(self, generator: torch.Generator) -> Batches:
        """The batches of one epoch, in an order drawn from the generator."""
        order = torch.randperm(len(self.pairs), generator=generator)
        return Batches(order.split(self.batch), functools.partial(self._made, self.pairs))

    @property
    def test(self) -> Batches:
        """The development part in its own order."""
        return Batches(torch.arange(len(self.scored)).split(self.batch), functools.partial(self._made, self.scored))

    def _made(self, pairs: Sequence[Pair], chosen: list[int]) -> dict[str, Tensor]:
        some = [pairs[i] for i in chosen]
        texts = [p.premise for p in some], [p.hypothesis for p in some]
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([p.label for p in some])}


def mnli(seed: int, folder: str, tokenizer: str, batch: int = 32, length: int = 128) -> Mnli:
    """MNLI as GLUE distributes it (``train.tsv``, ``dev_matched.tsv``), or as its authors do (``multinli_1.0_*.jsonl``).

    Args:
        seed: the recipe's; the pairs are the same for all.
        folder: where the files lie.
        tokenizer: the folder of a tokenizer.
        batch: pairs a batch.
        length: tokens of a pair at most.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: a file that is not what its name says.
    """
    from transformers import AutoTokenizer

    parts = [_read(_found(Path(folder), names)) for names in FILES.values()]
    return Mnli(*parts, AutoTokenizer.from_pretrained(tokenizer), batch, length)


def _found(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(names)}.")


def _read(path: Path) -> list[Pair]:
    """The labelled pairs of a file; those on which the annotators did not agree have none."""
    with path.open(encoding="utf-8") as lines:
        head = lines.readline().rstrip("\n").split("\t") if path.suffix == ".tsv" else None
        # No quoting: a quotation mark in these files is a quotation mark.
        rows = (
            json.loads(x) if head is None else dict(zip(head, x.rstrip("\n").split("\t"), strict=False)) for x in lines
        )
        try:
            pairs = [
                Pair(r["sentence1"], r["sentence2"], LABELS.index(r["gold_label"]))
                for r in rows
                if r["gold_label"] != "-"
            ]
        except (KeyError, ValueError) as e:
            raise ValueError(
                f"{path} should have sentence1, sentence2 and gold_label, one of {LABELS}: {e!r}."
            ) from None
    if not pairs:
        raise ValueError(f"{path} holds no labelled pair.")
    return pairs


def distilled(model: nn.Module, batch: Any, teacher: str, temperature: float = 2.0, hardness: float = 1.0) -> Tensor:
    """How far the logits are from a teacher's: KL divergence at a temperature, and the task's own loss for the rest.

    ``hardness * T^2 KL(teacher / T || student / T) + (1 - hardness) * cross-entropy`` (Hinton et al., 2015).

    Args:
        model, batch: as for any loss of a recipe; the batch is a mapping with labels.
        teacher: the folder of a network that was trained on the task.
        temperature: T; a higher one counts small probabilities more.
        hardness: the teacher's share of the loss.
    """
    own = model(**batch)
    with torch.no_grad():
        asked = {k: v for k, v in batch.items() if k != "labels"}
        theirs = _teacher(teacher, own.logits.device)(**asked).logits
    a, b = (F.log_softmax(logits / temperature, -1) for logits in (own.logits, theirs))
    likeness = F.kl_div(a, b, reduction="batchmean", log_target=True) * temperature**2
    value: Tensor = hardness * likeness + (1 - hardness) * own.loss
    return value


@functools.cache
def _teacher(folder: str, device: torch.device) -> nn.Module:
    return classifier(folder).to(device).eval().requires_grad_(False)
