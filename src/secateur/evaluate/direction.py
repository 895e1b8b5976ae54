"""Which way of a metric is better, from its name where the name says it."""

from __future__ import annotations

import re
from typing import Any

from secateur.errors import BadInput

HIGHER = frozenset(
    "acc accuracy agreement ap auc auroc bleu correct correlation dice exact f1 iou kappa kendall map matthews mcc miou mrr "
    "ndcg pearson precision psnr r2 recall rouge score similarity spearman ssim top1 top5".split()
)
"""Words of a name whose value is better higher."""
LOWER = frozenset(
    "bpb bpc ce cer cost crossentropy distance divergence drop entropy err error errors fid kl loss mae mape mse nll "
    "perplexity ppl regret rmse wer".split()
)
"""Words of a name whose value is better lower."""


def higher_is_better(name: str, asked: Any = None) -> bool:
    """Whether more of a metric is better: as asked, else what the words of its name say.

    Args:
        name: the metric's name; words are parted by anything but letters and digits.
        asked: ``True``, ``False``, or ``None`` to go by the name.

    Returns:
        ``True`` where a higher value is better.

    Raises:
        BadInput: something else was asked; or the name says nothing, or both.

    Example:
        >>> higher_is_better("test accuracy"), higher_is_better("val_loss"), higher_is_better("gain", asked=True)
        (True, False, True)
    """
    if asked is not None:
        if not isinstance(asked, bool):
            raise BadInput(f"higher_is_better is True, False or None; got {asked!r}.")
        return asked
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    up, down = bool(words & HIGHER), bool(words & LOWER)
    if up == down:
        said = "says both" if up else "does not tell"
        raise BadInput(
            f"the name of the metric {name!r} {said} which way is better: say higher_is_better=True (as for an accuracy) or "
            "higher_is_better=False (as for a loss)."
        )
    return up
