"""The sweep: the same trained weights pruned every way at every sparsity, and scored on test images."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import secateur
from examples.first_cut.data import Part, Split, split
from examples.first_cut.nets import Kind, accuracy, has_batchnorm, train
from examples.first_cut.settings import METHODS, Settings
from examples.first_cut.terminal import Stages


@dataclass(frozen=True)
class Trained:
    """One trained network: its seed, the epoch it was taken at, and the images it may and may not see."""

    seed: int
    model: nn.Module
    epoch: int
    split: Split


def prune(model: nn.Module, method: str, sparsity: float, seed: int) -> secateur.Report:
    """Prunes ``model`` in place by one of `METHODS`; "random" is the control, uniform over layers.

    Warnings (a layer left with nothing) are kept in the report, and the page tells of them; so they need not
    interrupt the run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.SecateurWarning)
        if method == "random":
            return secateur.prune(model, sparsity, criterion=secateur.random(seed), allocation="uniform")
        return secateur.prune(model, sparsity, allocation=method)


def counts(model: nn.Module, report: secateur.Report, example: Any) -> dict[str, Any]:
    """What was counted on a pruned model: weights, FLOPs for ``example``, and the layers as data meets them.

    The FLOPs of the pruned model leave out what is multiplied by a weight that is zero.
    """
    flops = secateur.count_flops(model, example)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    rows = sorted(report.chosen, key=lambda r: order[r.name])
    return {
        "sparsity": report.sparsity,
        "model_sparsity": report.model_sparsity,
        "zeros": report.zeros,
        "total": report.total,
        "warnings": list(report.warnings),
        "flops": flops.effective,
        "flops_dense": flops.total,
        "layers": [
            {
                "name": r.name.removesuffix(".weight"),
                "numel": r.numel,
                "fan_in": model.get_parameter(r.name)[0].numel(),
                "zeros": r.zeros,
                "sparsity": r.sparsity,
            }
            for r in rows
        ],
    }


def calibration(trained: Trained, settings: Settings) -> list[torch.Tensor]:
    """Batches of *training* images for BatchNorm recalibration, the same for every method within a seed."""
    images = trained.split.train.images
    generator = torch.Generator().manual_seed(trained.seed)
    batches = torch.randperm(len(images), generator=generator).split(settings.batch)
    return [images[i] for i in batches[: settings.calibration_batches]]


def recalibrated(model: nn.Module, test: Part, batches: list[torch.Tensor]) -> float | None:
    """Accuracy of a copy with BatchNorm statistics estimated anew; ``None`` where the network has none."""
    if not has_batchnorm(model):
        return None
    model = copy.deepcopy(model)
    secateur.recalibrate_batchnorm(model, batches)
    return accuracy(model, test)


def prune_and_score(trained: Trained, method: str, sparsity: float, batches: list[torch.Tensor]) -> dict[str, Any]:
    """One point of the sweep: a pruned copy, counted and scored; without BatchNorm "after" is ``None``."""
    model, test = copy.deepcopy(trained.model), trained.split.test
    report = prune(model, method, sparsity, trained.seed)
    scores = {"before": accuracy(model, test), "after": recalibrated(model, test, batches)}
    point = {"seed": trained.seed, "method": method, "asked": sparsity, **scores}
    return point | counts(model, report, test.images[:1])


def train_kind(kind: Kind, data: Part, settings: Settings, stages: Stages) -> list[Trained]:
    """One trained network a seed."""
    trained = []
    with stages.stage(f"train {kind.title}", len(settings.seeds) * settings.epochs) as advance:
        for seed in settings.seeds:
            parts = split(data, seed, settings)
            model, epoch = train(kind, parts, seed, settings, advance)
            trained.append(Trained(seed, model, epoch, parts))
            score = accuracy(model, parts.test)
            stages.say(f"  {kind.title}, seed {seed}: {score:.1%} on the test images, dense (epoch {epoch})")
    return trained


def sweep_kind(kind: Kind, trained: list[Trained], settings: Settings, stages: Stages) -> dict[str, Any]:
    """Prunes and scores every network of one kind by every method at every sparsity, as plain numbers."""
    dense, runs = [], []
    points = [(m, s) for m in METHODS for s in settings.sparsities]
    with stages.stage(f"prune {kind.title}", len(trained) * len(points)) as advance:
        for t in trained:
            test, batches = t.split.test, calibration(t, settings)
            scores: dict[str, float | None] = {
                part: accuracy(t.model, getattr(t.split, part)) for part in ("validation", "test")
            }
            scores["after"] = recalibrated(t.model, test, batches)
            dense.append({"seed": t.seed, "epoch": t.epoch} | scores)
            for method, sparsity in points:
                runs.append(prune_and_score(t, method, sparsity, batches))
                advance()
    return {
        "title": kind.title,
        "about": kind.about,
        "batchnorm": has_batchnorm(trained[0].model),
        "parameters": sum(p.numel() for p in trained[0].model.parameters()),
        "prunable": runs[0]["total"],
        "dense": dense,
        "runs": runs,
    }
