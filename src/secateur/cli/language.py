"""``secateur prune FOLDER --calibration TEXT``: a language model pruned with data, with progress by block and peak memory."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import secateur
from secateur.errors import BadInput
from secateur.evaluate.calibrate import Calibration, Step
from secateur.evaluate.text import next_token_loss, read_text, sequences
from secateur.report.report import Report
from secateur.report.tables import renderables
from secateur.report.words import printable
from secateur.stores.architectures import EXTRA

UNIT = 1024 if sys.platform.startswith("linux") else 1


def token_batches(
    folder: Path, texts: Sequence[Path], samples: int | None, length: int | None, seed: int | None
) -> list[Tensor]:
    """Sequences of tokens out of texts, by the folder's own tokenizer: 128 of 256 tokens, drawn with the seed 0.

    Raises:
        BadInput: the folder has no tokenizer, the texts cannot be read or are too short.
    """
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder: calibration needs a Hugging Face folder with its config and tokenizer."
        )
    try:
        library = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise BadInput(f"calibration on texts needs the folder's tokenizer; {EXTRA}") from None
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as e:
        raise BadInput(f"{folder} has no tokenizer that transformers can load: {str(e).splitlines()[0]}") from e
    files = sorted({"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()})
    if not any((folder / name).is_file() for name in files):  # transformers makes an empty one of nothing
        raise BadInput(f"{folder} has no tokenizer: none of {', '.join(files)} is there.")
    quiet = partial(tokenizer, add_special_tokens=False, verbose=False)
    text = read_text(texts)
    return sequences(
        quiet,
        text,
        length=256 if length is None else length,
        count=128 if samples is None else samples,
        seed=seed or 0,
    )


class Told:
    """What was done, block by block."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._began, self._before = time.perf_counter(), peak()

    def renderables(self, report: Report) -> Iterator[Any]:
        """The report, its table with the time and, of a solver, the error of every layer, and what it took in all."""
        rest = list(renderables(report))
        yield rest[0]
        yield self._table()
        yield from rest[2:]
        yield Text(
            f"took {time.perf_counter() - self._began:.0f} s; peak memory {gigabytes(peak())}, "
            f"{gigabytes(peak() - self._before)} above that before the model was loaded"
        )

    def _table(self) -> Table:
        solved = any(layer.loss is not None for s in self.steps for layer in s.layers)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layer, by block")
        for head in ("zero", "of", "sparsity", "seconds", *(("error", "damping") if solved else ())):
            table.add_column(head, justify="right")
        for step in self.steps:
            table.add_row(
                Text(f"{printable(step.block)} (all, with running it)", "dim"), "", "", "", f"{step.seconds:.1f}"
            )
            for layer in step.layers:
                share = f"{layer.zeros / max(1, layer.numel):.2%}"
                more = ["" if v is None else f"{v:.4g}" for v in ((layer.loss, layer.damping) if solved else ())]
                table.add_row(
                    Text(printable(layer.name)),
                    f"{layer.zeros:,}",
                    f"{layer.numel:,}",
                    share,
                    f"{layer.seconds:.2f}",
                    *more,
                )
        return table


def peak() -> int:
    """The largest memory this process has held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def gigabytes(count: int) -> str:
    """Bytes, readable.

    >>> gigabytes(1_500_000_000)
    '1.50 GB'
    """
    return f"{count / 1e9:.2f} GB"


@contextmanager
def bars(told: Told) -> Iterator[Callable[[Step], None]]:
    """A bar over the blocks, on a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("running the calibration up to the first block", total=None)

        def done(step: Step) -> None:
            told.steps.append(step)
            progress.update(
                task, description=f"{step.block}: {step.seconds:.1f} s", completed=step.number, total=step.blocks
            )

        yield done


def pruned(folder: Path, batches: Sequence[Tensor], sparsity: float | None, told: Told, **wanted: Any) -> Report:
    """Prunes a folder into another."""
    with bars(told) as progress:
        calibration = Calibration(batches, loss=next_token_loss, progress=progress)
        return secateur.prune(folder, sparsity, calibration=calibration, **wanted)
