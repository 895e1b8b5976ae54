"""Commands, options and exit codes. Strings become objects in `secateur.core.spelling`, not here."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.text import Text

import secateur
from secateur.errors import OutputExists, SecateurError, SecateurWarning
from secateur.evaluate.budget import check_budget
from secateur.report.compare_text import renderables as comparison_renderables
from secateur.report.tables import plan_renderables, renderables
from secateur.report.words import printable

from . import checkpoints, measuring, packing
from .output import show as _show
from .pairs import caps_of, pairs_of
from .pickled import as_files
from .progress import watched
from .working import Engine, InPlace, Jobs, Memory, Resume, speaks, worked_on

EXIT_CODES = """
Exit codes: 0 done; 1 an unexpected error; 2 the command cannot be read; 3 refused before anything was touched (bad input,
a tensor that cannot be pruned, a filter that matches nothing); 4 the output is already there; 75 stopped by SIGTERM
between two files, which --resume goes on with; 130 interrupted; 143 terminated.
"""

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prunes neural networks by magnitude, exactly: safetensors files and Hugging Face folders.",
    epilog=EXIT_CODES,
)

Source = Annotated[Path, typer.Argument(help="A .safetensors file, or a folder with one or with shards and an index.")]
Include = Annotated[list[str] | None, typer.Option("--include", help="Glob over tensor or module names; repeatable.")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="Glob over tensor or module names; repeatable.")]
Roles = Annotated[
    list[str] | None,
    typer.Option("--roles", help="GLOB=ROLE, where names do not tell what a tensor is; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, such as train.epochs=3; repeatable.")]
Quick = Annotated[bool, typer.Option("--quick", help="The recipe's quick form.")]
Full = Annotated[bool, typer.Option("--full", help="The recipe's full form.")]
GoOn = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted, or has more seeds now.")]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="serial, processes, or ray; the results are the same.")
]
Networks = Annotated[int, typer.Option("--jobs", min=1, help="How many networks are trained at once.")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read a .bin or .pt file, with torch.load(weights_only=True).")
]


Solver = Annotated[
    str | None, typer.Option(help="With --calibration: sparsegpt, exactobs, obs or refit; moves what stays.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="Text to calibrate a language model with, or a folder of *.txt; repeatable."),
]
Samples = Annotated[int | None, typer.Option(help="Sequences of tokens to calibrate with; 128 by default.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a sequence; 256 by default.")]
Seed = Annotated[int | None, typer.Option(help="Draws the sequences out of the text; 0 by default.")]
Allocation = Annotated[
    str | None,
    typer.Option(help="global (default), uniform (default of rows and solvers), uniform_plus, er, erk, lamp; owl."),
]
Pattern = Annotated[
    str | None,
    typer.Option(help='unstructured (default), row (default of wanda), "2:4", "4x4", channel, channel:in or head:12.'),
]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of the chosen weights to be zero, 0 <= s < 1.")]
Threshold = Annotated[float | None, typer.Option(help="Instead: weights with |w| below this go.")]
MinKeep = Annotated[int, typer.Option(help="Number of weights every tensor keeps at least.")]
NonFinite = Annotated[str, typer.Option(help="NaN and Inf: error, keep or prune.")]
First = Annotated[str | None, typer.Option(help="The first layer's weight, by name, for uniform_plus.")]
Last = Annotated[str | None, typer.Option(help="The last layer's weight, by name, for uniform_plus.")]
Caps = Annotated[
    list[str] | None, typer.Option(help="Cap on every tensor's sparsity, or GLOB=CAP for some; repeatable.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.command("inspect", epilog=EXIT_CODES)
def inspect_command(
    path: Source,
    include: Include = None,
    ignore: Ignore = None,
    roles: Roles = None,
    json: AsJson = False,
    allow_pickle: Pickle = False,
) -> None:
    """Count zeros, tensor by tensor, and say which tensors prune would choose and why it skips the others."""
    with as_files(path, allow_pickle) as target, watched(f"counting zeros in {path.name}"):
        report = secateur.inspect(target, include=include, ignore=ignore, roles=pairs_of(roles, "--roles") or None)
    _show(report.to_json() if json else list(renderables(report)))


@app.command("prune", epilog=EXIT_CODES)
def prune_command(
    src: Source,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the result goes; must not exist.")] = None,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="magnitude; the control: random, or random(SEED); with --calibration: wanda, taylor, fisher, …"
        ),
    ] = "magnitude",
    solver: Solver = None,
    calibration: Texts = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    allocation: Allocation = None,
    pattern: Pattern = None,
    include: Include = None,
    ignore: Ignore = None,
    max_sparsity: Caps = None,
    min_keep: MinKeep = 0,
    roles: Roles = None,
    nonfinite: NonFinite = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    in_place: InPlace = False,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    memory: Memory = None,
    engine: Engine = None,
    jobs: Jobs = 1,
    first: First = None,
    last: Last = None,
    json: AsJson = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune a checkpoint to another path; config, tokenizer and index are carried over."""
    wanted: dict[str, Any] = {
        "threshold": threshold, "criterion": criterion, "allocation": allocation, "pattern": pattern,
        "include": include, "ignore": ignore, "max_sparsity": caps_of(max_sparsity), "min_keep": min_keep,
        "nonfinite": nonfinite, "roles": pairs_of(roles, "--roles") or None,
    }  # fmt: skip
    data = {"solver": solver, "samples": samples, "length": length, "seed": seed}
    if calibration:
        odd = [("--dry-run", dry_run), ("--allow-pickle", allow_pickle), ("--in-place", in_place), ("--resume", resume)]
        checkpoints.refuse_together("--calibration", dict([*odd, ("--engine", engine), ("--memory", memory)]))
        place = checkpoints.place_of(src, out, in_place, overwrite)
        _prune_with_data(src, place, overwrite, calibration, data, sparsity, json, wanted)
        return
    checkpoints.refuse_without("--calibration TEXT", data)
    checkpoints.refuse_together("--allow-pickle", {"--in-place": allow_pickle and in_place})
    target_place = None if dry_run else checkpoints.place_of(src, out, in_place, overwrite or resume)
    how = {"memory": memory, "resume": resume, "in_place": in_place, "first": first, "last": last}
    with as_files(src, allow_pickle) as target, worked_on(engine, jobs, **how) as files:
        found: Any = (
            secateur.plan(target, sparsity, files=files, **wanted)
            if target_place is None
            else secateur.prune(target, sparsity, out=target_place, overwrite=overwrite, files=files, **wanted)
        )
    if speaks():
        _show(found.to_json() if json else list(plan_renderables(found) if dry_run else renderables(found)))


@app.command("plan", epilog=EXIT_CODES)
def plan_command(
    src: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan, JSON; must not exist.")],
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    criterion: Annotated[str, typer.Option(help="magnitude; the control: random, or random(SEED).")] = "magnitude",
    allocation: Allocation = None,
    pattern: Pattern = None,
    include: Include = None,
    ignore: Ignore = None,
    max_sparsity: Caps = None,
    min_keep: MinKeep = 0,
    roles: Roles = None,
    nonfinite: NonFinite = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan that is there.")] = False,
    memory: Memory = None,
    engine: Engine = None,
    jobs: Jobs = 1,
    first: First = None,
    last: Last = None,
    json: AsJson = False,
) -> None:
    """Write what prune would do as a small file, which apply carries out, here or on another machine."""
    with worked_on(engine, jobs, memory=memory, first=first, last=last) as files:
        made = secateur.plan(
            src, sparsity, threshold=threshold, criterion=criterion, allocation=allocation, pattern=pattern, include=include,
            ignore=ignore, max_sparsity=caps_of(max_sparsity), min_keep=min_keep, nonfinite=cast(Any, nonfinite),
            roles=pairs_of(roles, "--roles") or None, files=files,
        )  # fmt: skip
    if speaks():
        secateur.save_plan(made, out, overwrite=overwrite)
        _show(made.to_json() if json else [*plan_renderables(made), Text(f"written to {out}")])


def _prune_with_data(
    src: Path, out: Path, overwrite: bool, texts: list[Path], data: dict[str, Any], sparsity: float | None, json: bool,
    wanted: dict[str, Any],
) -> None:  # fmt: skip
    from . import language  # for those who calibrate

    told = language.Told()
    batches = language.token_batches(src, texts, data["samples"], data["length"], data["seed"])
    more = {"solver": data["solver"], "out": out, "overwrite": overwrite}
    report = language.pruned(src, batches, sparsity, told, **wanted, **more)
    _show(report.to_json() if json else list(told.renderables(report)))


@app.command("run", epilog=EXIT_CODES)
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    settings: Settings = None,
    quick: Quick = False,
    full: Full = False,
    resume: GoOn = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print it; run nothing.")] = False,
    engine: EngineName = None,
    jobs: Networks = 1,
    json: AsJson = False,
) -> None:
    """Run a recipe: train, prune in several ways, compare."""
    from secateur.recipe.run import to_json  # pydantic and yaml, for those who run one

    from . import recipes

    asked = recipes.prepared(recipe, settings or [], _form(quick, full), resume or dry_run)
    if dry_run:
        _show(asked.model_dump_json(indent=2))
        return
    cells = recipes.run_shown(asked, engine, jobs)
    place = Path(asked.folder).resolve() / "report.html"
    _show(to_json(cells) if json else [recipes.table(asked, cells), f"The report: {place}"])


@app.command("sensitivity", epilog=EXIT_CODES)
def sensitivity_command(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe, YAML; its dense network is scanned, and trained if need be.")
    ],
    sparsities: Annotated[str | None, typer.Option(help="Such as .5,.8,.9; by default .5,.7,.8,.9,.95.")] = None,
    criterion: Annotated[str, typer.Option(help="magnitude; or the control: random, or random(SEED).")] = "magnitude",
    pattern: Annotated[str, typer.Option(help='unstructured, "2:4", "4x4", channel or channel:in.')] = "unstructured",
    include: Include = None,
    ignore: Ignore = None,
    roles: Roles = None,
    group: Annotated[
        list[str] | None, typer.Option("--group", help="NAME=GLOB: tensors that are pruned together; repeatable.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Which of the metrics of evaluate; the first by default.")] = None,
    better: Annotated[
        bool | None, typer.Option("--higher-is-better/--lower-is-better", help="Where the metric's name does not say.")
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="validation, train or test: what the metric is measured on.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="One of the recipe's seeds; the first by default.")] = None,
    allocate: Annotated[
        float | None, typer.Option(help="Say what to prune of each layer for this share in all.")
    ] = None,
    budget: Annotated[str, typer.Option(help="What the share is of: weights, flops or bytes.")] = "weights",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where it goes; sensitivity in the run's folder by default.")
    ] = None,
    settings: Settings = None,
    quick: Quick = False,
    full: Full = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a scan that is there.")] = False,
    json: AsJson = False,
) -> None:
    """Prune a recipe's dense network one layer at a time, and say which layers can bear what."""
    from . import recipes, sensitivity

    if allocate is not None:
        check_budget(allocate, budget)
    asked = recipes.prepared(recipe, settings or [], _form(quick, full), resume=True)
    more = {
        "criterion": criterion, "pattern": pattern, "include": include, "ignore": ignore, "metric": metric, "part": on,
        "roles": pairs_of(roles, "--roles") or None, "groups": sensitivity.groups_of(group), "higher_is_better": better,
        "seed": seed, "folder": out, "resume": resume, "flops": allocate is not None and budget == "flops",
    }  # fmt: skip
    found = sensitivity.scanned(asked, sensitivity.numbers(sparsities), more)
    made, place = (None, None) if allocate is None else sensitivity.allocated(found, allocate, budget)
    _show(found.scan.to_json() if json else sensitivity.shown(found, made, place))


@app.command("compare", epilog=EXIT_CODES)
def compare_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    settings: Settings = None,
    quick: Quick = False,
    full: Full = False,
    resume: GoOn = False,
    found: Annotated[bool, typer.Option("--found", help="Run nothing: compare the cells that are there.")] = False,
    baseline: Annotated[
        str | None, typer.Option(help="The method to beat; without it, the first whose name begins with magnitude.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What to compare by; without it, the first metric.")] = None,
    engine: EngineName = None,
    jobs: Networks = 1,
    json: AsJson = False,
) -> None:
    """Run a recipe, and say where each method beats the baseline, by how much, and which rules were broken."""
    from . import recipes  # pydantic and yaml, for those who run one

    chosen = [*(settings or []), *recipes.against(baseline, metric)]
    asked = recipes.prepared(recipe, chosen, _form(quick, full), resume or found)
    comparison = recipes.compared(asked, found, engine, jobs)
    place = Path(asked.folder).resolve() / "compare.html"
    _show(comparison.to_json() if json else [*comparison_renderables(comparison), f"The report: {place}"])


@app.command("import-recipe", epilog=EXIT_CODES)
def import_recipe_command(
    old: Annotated[Path, typer.Argument(help="A pruning recipe of SparseML: YAML, or Markdown with YAML before it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the new recipe goes; must not exist.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
) -> None:
    """Turn a SparseML recipe into one for run; what could not be carried over is said on stderr, a line each."""
    from . import recipes  # pydantic and yaml, for those who use recipes

    text, notes = recipes.imported(old)
    if out is None:
        typer.echo(text, nl=False)
    else:
        recipes.save(text, out, overwrite)
    for note in notes:
        typer.echo(printable(note), err=True)


app.command("apply", epilog=EXIT_CODES)(checkpoints.apply_command)
app.command("verify", epilog=EXIT_CODES)(checkpoints.verify_command)
app.command("clean", epilog=EXIT_CODES)(checkpoints.clean_command)
app.command("pack", epilog=EXIT_CODES)(packing.pack_command)
app.command("unpack", epilog=EXIT_CODES)(packing.unpack_command)
app.command("bench", epilog=EXIT_CODES)(measuring.bench_command)
app.command("tune", epilog=EXIT_CODES)(measuring.tune_command)


def _form(quick: bool, full: bool) -> str | None:
    """The form of a recipe that was asked for."""
    if quick and full:
        raise typer.BadParameter("say --quick or --full, one of the two.")
    return "quick" if quick else "full" if full else None


def _refuse(error: Exception, code: int) -> NoReturn:
    lines = [*str(error).splitlines(), *getattr(error, "__notes__", ())]
    shown = "\n".join(printable(line) for line in lines)
    text = Text.assemble(("error: ", "bold red"), shown)  # never as markup: names come from untrusted files
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)
    raise SystemExit(code)


def run() -> None:
    """The command line with its exit codes; warnings go into the report, errors to stderr in one line."""
    warnings.simplefilter("ignore", SecateurWarning)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, so that staged files are removed
    try:
        app(prog_name="secateur")
    except OutputExists as e:
        _refuse(e, 4)
    except SecateurError as e:
        _refuse(e, 3)
    except OSError as e:  # a full disk, say: what was there is there, and what --resume can go on with is told
        _refuse(e, 1)
