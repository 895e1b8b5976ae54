"""How sensitive the layers of a recipe's dense network are, measured on data that does not judge it in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from secateur.errors import BadInput, OutputExists
from secateur.evaluate.flops import Flops, count_flops
from secateur.evaluate.sensitivity import check, sensitivity
from secateur.evaluate.sensitivity_facts import Sensitivity
from secateur.train.engine import order_of

from .run import held, quiet
from .schema import Recipe
from .seed import Seed
from .training import Data, Progress, moved

Part = Literal["validation", "train", "test"]
BATCHES = 100
"""Batches of the training part that are measured on, at most."""


@dataclass(frozen=True)
class Scanned:
    """A finished scan.

    Attributes:
        scan: what was found.
        folder: where it lies: ``sensitivity.json``, ``report.html``, the cells.
        flops: of the dense network on one example, where they were asked for.
    """

    scan: Sensitivity
    folder: Path
    flops: Flops | None


def scan(
    recipe: Recipe,
    sparsities: Sequence[float] | None = None,
    *,
    part: Part | None = None,
    seed: int | None = None,
    folder: Path | None = None,
    resume: bool = False,
    flops: bool = False,
    progress: Progress = quiet,
    **choice: Any,
) -> Scanned:
    """Scans the dense network of a recipe, which is read from the run's folder, or trained into it.

    Its metrics are those of the recipe's ``evaluate``, which gets the data with another part in the place of ``test``: what
    is chosen by a test set is flattered by it.

    Args:
        recipe: whose network.
        sparsities: as for `sensitivity`.
        part: ``"validation"``, the part of that name that the recipe's data may have; ``"train"``, `BATCHES` batches of
            the training part; ``"test"``. By default the validation part; where there is none the training part, unless the
            recipe has an ``evaluate`` of its own, which may not take batches.
        seed: one of the recipe's, the first by default.
        folder: where the scan is kept, by default ``sensitivity`` in the run's folder.
        resume: go on with a scan that is there.
        flops: count them too, for an allocation.
        progress: told what is trained, and how many cells there are.
        choice: ``criterion``, ``pattern``, ``include``, ``ignore``, ``roles``, ``groups``, ``metric``, ``higher_is_better``, as
            for `sensitivity`.

    Raises:
        BadInput: another seed or part; or what `sensitivity` refuses.
        OutputExists: a scan is there, without ``resume``.
    """
    seed = recipe.seeds[0] if seed is None else seed
    if seed not in recipe.seeds:
        raise BadInput(f"this recipe has the seeds {', '.join(map(str, recipe.seeds))}; got {seed}.")
    place = Path(recipe.folder) / "sensitivity" if folder is None else folder
    if (place / "run.json").exists() and not resume:
        raise OutputExists(
            f"{place} holds a scan already: go on with it with --resume, or choose another place with -o."
        )
    with held(recipe) as root:
        one = Seed(recipe, root / f"seed-{seed}", seed, progress)
        data, told = _part_of(recipe, one.data, part, seed)
        check(one.model(), sparsities, **choice)  # before hours of training
        model = one.trained()
        facts = {
            "name": f"{recipe.name}: sensitivity", "network": f"dense, seed {seed}", "measured on": told,
            "evaluate": "accuracy" if recipe.evaluate is None else recipe.evaluate.call,
        }  # fmt: skip

        def evaluate(network: nn.Module) -> Any:
            return one.score(network, data)

        found = sensitivity(
            model, evaluate, sparsities, folder=place, seed=seed, facts=facts,
            progress=lambda _, done, total: progress("all", done, total), **choice,
        )  # fmt: skip
        example = _example(one.data, one.device) if flops else None
        return Scanned(found, place, None if example is None else count_flops(model, example))


class _Instead:
    """Data with another part in the place of its ``test``."""

    def __init__(self, data: Data, test: Any) -> None:
        self._data, self.test = data, test

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def _part_of(recipe: Recipe, data: Data, part: Any, seed: int) -> tuple[Any, str]:
    """The data to measure on, and what to call it."""
    if part is not None and part not in get_args(Part):
        raise BadInput(f"measure on one of {', '.join(get_args(Part))}; got {part!r}.")
    validation = getattr(data, "validation", None)
    if part == "validation" and validation is None:
        raise BadInput("the recipe's data has no part called validation: give it one, or say --on train.")
    if part is None and validation is None and recipe.evaluate is not None:
        raise BadInput(
            "the recipe's data has no part called validation, and its own evaluate may not take training batches: say --on "
            "train if it does, give the data a validation part, or say --on test, knowing that what is chosen by it is "
            "flattered by it."
        )
    if part == "test":
        return data, "the test part, by which what is chosen here must not be judged again"
    if part == "train" or validation is None:
        batches = list(islice(data.train(order_of(seed, 0)), BATCHES))
        return _Instead(data, batches), f"{len(batches)} batches of the training part, which the network has learned"
    return _Instead(data, validation), "the validation part"


def _example(data: Data, device: Any) -> Any:
    """One input, to count FLOPs on: the first of the training part."""
    batch: Any = next(iter(data.train(order_of(0, 0))))
    if isinstance(batch, Mapping):
        one: Any = {k: v[:1] for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    else:
        one = batch[0][:1]
    return moved(one, device)
