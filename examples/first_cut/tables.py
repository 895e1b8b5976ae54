"""The numbers people ask for first, as tables of at most 80 columns for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from examples.first_cut.answer import headline, sentence
from examples.first_cut.job import Results
from examples.first_cut.settings import METHODS
from examples.first_cut.summary import Network
from examples.first_cut.words import NAMES, TESTS, percent, span
from secateur.report.words import share


def print_summary(results: Results, console: Console) -> None:
    """Accuracies, the encoder's scores, and the answer to the question."""
    for network in results.networks:
        console.print(_network(network))
    console.print(_encoder(results))
    console.print("Does global prune the early layers less?", style="bold")
    for line in (headline(results.answers), *(f"  {sentence(a)}" for a in results.answers)):
        console.print(line, highlight=False, soft_wrap=True)


def _table(title: str, head: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _network(network: Network) -> Table:
    after = ", BatchNorm recalibrated" if network.batchnorm else ""
    title = f"{network.title}: test accuracy in %{after} (dense {percent(network.dense)})"
    table = _table(title, ["pruned", *(NAMES[m] for m in METHODS)])
    for row in zip(*(network.points[m] for m in METHODS), strict=True):
        table.add_row(share(row[0].sparsity, 0), *(percent(p.final).removesuffix("%") for p in row))
    return table


def _encoder(results: Results) -> Table:
    encoder = results.measured["encoder"]
    table = _table(f"{encoder['title']}: agreement with people", ["pruned", "", *TESTS.values()])
    table.add_row(share(0.0, 0), "dense", *(span(encoder["dense"][t]) for t in TESTS))
    for r in encoder["runs"]:
        table.add_row(share(r["asked"], 0), NAMES[r["method"]], *(span(r["scores"][t]) for t in TESTS))
    return table
