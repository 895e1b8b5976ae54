"""Models of transformers from local folders."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def pretrained(kind: Any, folder: str, **more: Any) -> nn.Module:
    """A model of transformers in float32, without its bar: the run has one of its own.

    Args:
        kind: such as ``transformers.AutoModel``.
        folder: a local folder, or a name on the Hub.
        more: further arguments of ``from_pretrained``.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: nn.Module = kind.from_pretrained(folder, dtype=torch.float32, **more)
    return made


def resnet50(folder: str | None = None, labels: int = 1000) -> nn.Module:
    """ResNet-50; without a folder, with fresh weights.

    Args:
        folder: with ``config.json`` and weights, such as a copy of microsoft/resnet-50.
        labels: classes of a fresh one.
    """
    from transformers import AutoModelForImageClassification, ResNetConfig

    if folder is not None:
        return pretrained(AutoModelForImageClassification, folder)
    made: nn.Module = AutoModelForImageClassification.from_config(ResNetConfig(num_labels=labels))
    return made


def classifier(folder: str, labels: int = 3) -> nn.Module:
    """BERT, or another encoder, with a head for so many labels; a head that is not there is drawn.

    Args:
        folder: such as a copy of bert-base-uncased.
        labels: how many.
    """
    from transformers import AutoModelForSequenceClassification

    return pretrained(AutoModelForSequenceClassification, folder, num_labels=labels)
