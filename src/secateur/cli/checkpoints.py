"""``secateur plan``, ``apply``, ``verify`` and ``clean``: pruning in two steps, and what comes after."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import secateur
from secateur.carry import check_out
from secateur.errors import SecateurError
from secateur.report.tables import renderables
from secateur.report.words import printable

from .output import show
from .working import Engine, InPlace, Jobs, Memory, Resume, speaks, worked_on

AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


def apply_command(
    plan: Annotated[Path, typer.Argument(help="What secateur plan wrote.")],
    src: Annotated[Path, typer.Argument(help="The checkpoint it was made of, or a copy on another machine.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the result goes; must not exist.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    in_place: InPlace = False,
    resume: Resume = False,
    memory: Memory = None,
    engine: Engine = None,
    jobs: Jobs = 1,
    json: AsJson = False,
) -> None:
    """Carry out a plan: the same bytes as prune writes, on any machine that has the checkpoint."""
    made = secateur.load_plan(plan)
    with worked_on(engine, jobs, memory=memory, resume=resume, in_place=in_place) as files:
        report = secateur.apply(
            made, src, out=place_of(src, out, in_place, overwrite or resume), overwrite=overwrite, files=files
        )
    if speaks():
        show(report.to_json() if json else list(renderables(report)))


def place_of(src: Path, out: Path | None, in_place: bool, taken: bool) -> Path:
    """Where a result goes, refused before minutes are spent on reading; ``taken``: something may be there already."""
    if (out is None) != in_place:
        raise typer.BadParameter(
            "say where the result goes with -o, replace the source with --in-place, or ask for the plan alone with --dry-run."
        )
    place = src if out is None else out
    check_out(src, place, taken, in_place)
    return place


def refuse_together(one: str, others: Mapping[str, object]) -> None:
    """Refuses the first of some options that was given beside one that it does not go with."""
    if odd := [name for name, given in others.items() if given]:
        raise typer.BadParameter(f"{odd[0]} does not go with {one}.")


def refuse_without(one: str, others: Mapping[str, object]) -> None:
    """Refuses the first of some options that was given and goes only with another."""
    if odd := [name for name, given in others.items() if given is not None]:
        raise typer.BadParameter(f"--{odd[0]} needs {one}.")


def verify_command(
    path: Annotated[Path, typer.Argument(help="A folder that secateur prune or apply wrote.")], json: AsJson = False
) -> None:
    """Compare a result with its manifest: every file by its bytes, every tensor by its zeros."""
    from secateur.stores.verify import verify

    found = verify(path)
    if json:
        show(json_text.dumps(asdict(found), indent=1))
    elif not found.wrong:
        share = f", {found.pruned / found.of:.2%}" if found.of else ""
        zero = f"{found.pruned:,} of {found.of:,} pruned weights zero{share}"
        show([Text(f"{found.files} files are as they were written; {zero}")])
    if found.wrong:
        wrong = "; ".join(printable(w) for w in found.wrong[:8])
        raise SecateurError(f"{path} is not as it was written: {wrong}.")


def clean_command(
    folder: Annotated[Path, typer.Argument(help="The folder that results were written into.")],
    json: AsJson = False,
) -> None:
    """Remove what interrupted runs left in a folder; what a run is at work on stays."""
    from secateur.stores.staging import remove_stale

    if not folder.is_dir():
        raise secateur.BadInput(f"{folder} is not a folder; give the one that results were written into.")
    removed = remove_stale(folder.iterdir())
    if json:
        show(json_text.dumps([str(p) for p in removed]))
    else:
        show([Text(f"removed {p.name}") for p in removed] or [Text("nothing was left there by interrupted runs")])
