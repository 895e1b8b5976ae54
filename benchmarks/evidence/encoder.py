"""A sentence encoder pruned once, without training: all-MiniLM-L6-v2 on three tests of meaning.

The 36 linear layers of the six blocks are pruned, 10.6 million weights. The pooler is left out: no embedding passes through
it. A text's embedding is the mean of the last hidden states at length 1.

- *WordNet*: 500 nouns and their definitions; the share of definitions that lie nearest to their own word.
- *WordSim-353*: Spearman's correlation of cosines with people's judgements of 353 pairs of words.
- *Lee50*: Pearson's of cosines with people's judgements of the pairs of 50 texts.

Methods that look at data see 512 definitions of other nouns of WordNet, drawn by the seed; those of one length share a batch,
so that nothing is filled up.

Differences have intervals over what is tested: the same 500 draws, with replacement, of nouns, pairs or texts for all
methods. Scores have intervals over seeds, where a seed changes the method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence import sources
from benchmarks.evidence.common import cells, seeds_of, shown
from benchmarks.evidence.oneshot import Results, cost, on_device, over, points, pruned
from benchmarks.result import Bar, Table
from examples.first_cut.encoder import UNUSED, Encoder, embed, load, scorers
from examples.published import minilm
from secateur.evaluate.statistics import bootstrap, percentile_interval

NAME = "encoder"
TITLE = "A sentence encoder, pruned once"
SEEDS = (0, 1, 2)

AMOUNTS = ("0.5", "0.7")
TESTS = {"wordnet": "WordNet", "wordsim": "WordSim-353", "lee50": "Lee50"}
REFERENCE = "uniform"


@dataclass(frozen=True)
class Size:
    """How much is read.

    Attributes:
        definitions: of the calibration.
        nouns: of WordNet that are tested.
        resamples: draws behind the intervals over what is tested.
        real: MiniLM; else a tiny encoder with fresh weights and MiniLM's tokens.
    """

    definitions: int = 512
    nouns: int = 500
    resamples: int = 500
    real: bool = True


FULL, QUICK = Size(), Size(12, 10, 20, False)


@dataclass(frozen=True)
class Subject:
    """What is pruned and tested.

    Attributes:
        encoder: the network, and the texts and judgements of WordSim-353 and Lee50.
        words, definitions: token lists of the nouns that are tested and of what they mean.
        others: other nouns and what they mean.
        tokenizer: makes token lists of texts.
    """

    encoder: Encoder
    words: Sequence[Sequence[int]]
    definitions: Sequence[Sequence[int]]
    others: Sequence[sources.Meaning]
    tokenizer: Any


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Makes, or reads, the cells of a seed: all of the first seed, of others those that a seed changes."""
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {}
    if seed == SEEDS[0]:
        makers["dense"] = partial(_dense, size)
    for point in points(AMOUNTS):
        if seed == SEEDS[0] or point.drawn:
            makers[point.name] = partial(_pruned, seed, size, point)
    return cells(folder, makers, asdict(size))


# What is made


def _dense(size: Size) -> dict[str, Any]:
    subject = subject_of(size)
    return scored(subject.encoder.model, subject, size)


def _pruned(seed: int, size: Size, point: Any) -> dict[str, Any]:
    subject = subject_of(size)
    batches = partial(_calibration, subject, size, seed)
    model, facts = pruned(subject.encoder.model, point, seed, batches, ignore=UNUSED)
    return {**scored(model.cpu(), subject, size), **facts}


def drawn_nouns(subject: Subject, size: Size, seed: int) -> list[sources.Meaning]:
    """The nouns that a seed draws of those that are not tested."""
    drawn = torch.randperm(len(subject.others), generator=torch.Generator().manual_seed(seed))[: size.definitions]
    return [subject.others[i] for i in drawn.tolist()]


def _calibration(subject: Subject, size: Size, seed: int, most: int = 32) -> list[dict[str, Tensor]]:
    """Definitions of the nouns that the seed draws, in batches of one length."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for tokens in subject.tokenizer([m.definition for m in drawn_nouns(subject, size, seed)])["input_ids"]:
        by_length.setdefault(len(tokens), []).append(tokens)
    chunks = [same[i : i + most] for _, same in sorted(by_length.items()) for i in range(0, len(same), most)]
    return [on_device(minilm.padded(chunk, subject.tokenizer.pad_token_id)) for chunk in chunks]


def scored(model: nn.Module, subject: Subject, size: Size) -> dict[str, Any]:
    """Every test's score, and the scores of its draws."""
    found = scorers(embed(model, subject.encoder), subject.encoder)
    hits = _hits(model, subject)
    found["wordnet"] = (lambda index: float(hits[index].mean()), len(hits))
    scores = {}
    for test in TESTS:
        score, n = found[test]
        draws = bootstrap(score, n, size.resamples).round(6).tolist()
        scores[test] = {"score": score(np.arange(n)), "draws": draws, "n": n}
    return {"scores": scores, "model": "all-MiniLM-L6-v2" if size.real else "a tiny encoder with fresh weights"}


@torch.no_grad()
def _hits(model: nn.Module, subject: Subject, most: int = 64) -> np.ndarray:
    """Of every definition, whether its own word lies nearest: ``(nouns,)`` of 0 and 1."""
    sides = []
    for texts in (subject.words, subject.definitions):
        order = torch.tensor(sorted(range(len(texts)), key=lambda i: len(texts[i])))
        side = torch.empty(len(texts), model.config.hidden_size)
        for chosen in order.split(most):
            side[chosen] = minilm.mean(model, minilm.padded([texts[i] for i in chosen], subject.tokenizer.pad_token_id))
        sides.append(side)
    words, definitions = sides
    return ((definitions @ words.T).argmax(1) == torch.arange(len(words))).double().numpy()


@functools.cache
def subject_of(size: Size) -> Subject:
    """The encoder and what it is tested on: the same nouns for all seeds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm.folder())
    every = sources.meanings()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    tested = [every[i] for i in order[: size.nouns]]
    taken = {m.definition for m in tested}
    others = [every[i] for i in order[size.nouns :] if every[i].definition not in taken]
    tokens = [tokenizer(t)["input_ids"] for t in ([m.word for m in tested], [m.definition for m in tested])]
    encoder = load()
    if not size.real:
        encoder = Encoder(_stand_in(), encoder.batches, encoder.words, encoder.wordsim, encoder.lee)
    return Subject(encoder, *tokens, others, tokenizer)


def _stand_in() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, initializer_range=0.5
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(config).eval()


# What is told


def summary(results: Results) -> tuple[list[Table], list[Bar]]:
    """Scores, and differences from magnitude within each layer."""
    first = next(c for r in results for c in r.values())
    rows = [("dense", *levels(results, "dense"), "", "")]
    above = []
    for p in points(AMOUNTS):
        if any(p.name in r for r in results):
            rows.append((p.title, *levels(results, p.name), *cost(results, p.name)))
            reference = f"{REFERENCE}-{p.amount}"
            if p.method != REFERENCE and any(reference in r for r in results):
                above.append((p.title, *(difference(results, p.name, reference, t) for t in TESTS)))
    title = (
        f"{first['model']}: scores times 100; {seeds_of(results)}, mean ± half of the 95 % interval where a seed changes the "
        "method, else one run"
    )
    heads = ("<", *(f"{title} ({first['scores'][t]['n']})" for t, title in TESTS.items()))
    between = "Above magnitude within each layer, times 100, with the 95 % interval over what is tested"
    return [Table(title, (*heads, "seconds", "peak over the model, MiB"), rows), Table(between, heads, above)], []


def levels(results: Results, name: str) -> list[str]:
    """The scores of a cell, times 100, as a table shows them."""
    found = (over(results, name, lambda c, t=t: 100 * c["scores"][t]["score"]) for t in TESTS)
    return ["" if i is None else shown(i, digits=1) for i in found]


def difference(results: Results, name: str, reference: str, test: str) -> str:
    """The difference of the means over seeds, and its interval over the draws of what is tested."""
    ours, theirs = (_draws(results, n, test) for n in (name, reference))
    low, high = percentile_interval(ours[1:] - theirs[1:])
    return f"{ours[0] - theirs[0]:+.1f} ({low:+.1f} to {high:+.1f})"


def _draws(results: Results, name: str, test: str) -> np.ndarray:
    """A score and after it those of its draws, times 100, each the mean over the seeds that have the cell."""
    found = [r[name]["scores"][test] for r in results if name in r]
    return 100 * np.mean([[f["score"], *f["draws"]] for f in found], axis=0)
