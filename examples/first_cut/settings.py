"""What the first cut does, as data: the full run, and a tiny one for the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

METHODS = ("global", "lamp", "erk", "uniform", "random")
"""Four allocations of plain magnitude, and the control: random weights, the same share in every layer."""

REFERENCE = "global"
"""The method the others are compared with, seed by seed."""


@dataclass(frozen=True)
class Settings:
    """Everything a run of the first cut depends on; it is written into the report as it is.

    Attributes:
        seeds: one trained network of each kind a seed; a seed fixes split, initial weights and batches.
        sparsities: fractions of the prunable weights of LeNet and the CNN to remove.
        layer_sparsity: the one of ``sparsities`` at which the page shows every layer.
        encoder_sparsities: fractions of the encoder's linear weights to remove.
        epochs: passes over the training images.
        batch: images a step, in training and in BatchNorm recalibration.
        train, validation, test: images *a class* in each part of the split.
        calibration_batches: training batches that re-estimate the BatchNorm statistics of a pruned network.
        resamples: bootstrap draws behind the intervals of the encoder's scores.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.93, 0.95, 0.98)
    layer_sparsity: float = 0.9
    encoder_sparsities: tuple[float, ...] = (0.3, 0.5, 0.7)
    epochs: int = 8
    batch: int = 64
    train: int = 350
    validation: int = 50
    test: int = 100
    calibration_batches: int = 16
    resamples: int = 1000


FULL = Settings()

QUICK = replace(
    FULL,
    seeds=(0, 1),
    sparsities=(0.5, 0.9, 0.98),
    encoder_sparsities=(0.5,),
    epochs=1,
    train=60,
    validation=10,
    test=20,
    calibration_batches=4,
    resamples=50,
)
