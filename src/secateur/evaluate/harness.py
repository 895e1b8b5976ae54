"""Tasks of EleutherAI's lm-evaluation-harness, as the metrics of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import BadInput
from secateur.train.randomness import get_random, set_random

from .mode import only_training


def lm_eval_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    shots: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
) -> dict[str, float]:
    """Scores a language model of transformers by tasks of the harness (the extra ``lm-eval``).

    As a recipe's ``evaluate`` it is ``{call: "secateur.evaluate.harness:lm_eval_tasks", args: {tasks: […]}}``, and the
    recipe's data has the tokenizer as ``tokenizer``. Perplexities belong into the recipe's ``lower_is_better``.

    Args:
        model: a causal model of transformers, on its own device; it is left as it is.
        tokenizer: its tokenizer, or an object that has it as ``tokenizer``.
        tasks: names of the harness's tasks, paths of YAML files, or such a file's content as a mapping. Data of the harness's own
            tasks comes from the Hub; that of a file, from where ``dataset_kwargs`` says.
        shots: examples before each question; the task's own number unless given.
        limit: questions a task, or a share of them below 1; all unless given.
        batch_size: sequences at once.
        max_length: tokens of a sequence; the model's own limit unless given.

    Returns:
        ``{"task metric": value}``, with a filter's name behind the metric where the task has one. Standard errors are left out:
        they are over questions, and a comparison's intervals are over seeds.

    Raises:
        BadInput: the harness is not installed; no tasks, or one that it does not know; no tokenizer.

    Example:
        >>> lm_eval_tasks(nn.Linear(1, 1), None, [])
        Traceback (most recent call last):
            ...
        secateur.errors.BadInput: ...

    Reference:
        Gao et al., The Language Model Evaluation Harness, https://github.com/EleutherAI/lm-evaluation-harness; written
        against 0.4.13.
    """
    simple_evaluate, hflm, manager = _harness()
    if isinstance(tasks, str | Mapping) or not tasks:
        raise BadInput(f"tasks is a list of names, paths or mappings, not empty; got {tasks!r}.")
    own = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(own):
        raise BadInput(
            f"a tokenizer is needed, or an object that has one as .tokenizer; got {type(tokenizer).__name__}."
        )
    given = [dict(t) if isinstance(t, Mapping) else t for t in tasks]
    known = any(isinstance(t, str) and not Path(t).is_file() for t in given)  # reading all that it knows takes seconds
    before = get_random()
    try:
        with only_training(model):
            lm = hflm(pretrained=model, tokenizer=own, batch_size=batch_size, max_length=max_length)
            found = simple_evaluate(
                model=lm, tasks=given, num_fewshot=shots, limit=limit, bootstrap_iters=0, log_samples=False,
                task_manager=manager(include_defaults=known),
            )  # fmt: skip
    except KeyError as e:
        raise BadInput(f"the harness does not know a task: {e.args[0] if e.args else e}.") from e
    finally:
        set_random(before)
    return {
        _name(task, metric): float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float)
        and "_stderr" not in metric
        and metric != "sample_len"
        and not math.isnan(value)
    }


def _harness() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found, unused-ignore]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, unused-ignore]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, unused-ignore]
    except ImportError as e:
        raise BadInput(
            f"lm_eval_tasks needs lm-eval with its part for transformers: pip install 'secateur[lm-eval]' ({e})."
        ) from None
    return simple_evaluate, HFLM, TaskManager


def _name(task: str, metric: str) -> str:
    """``"hellaswag"``, ``"acc_norm,none"`` -> ``"hellaswag acc_norm"``.

    >>> _name("hellaswag", "acc_norm,none"), _name("gsm8k", "exact_match,strict-match")
    ('hellaswag acc_norm', 'gsm8k exact_match strict-match')
    """
    name, _, filtered = metric.partition(",")
    return " ".join(part for part in (task, name, "" if filtered == "none" else filtered) if part)
