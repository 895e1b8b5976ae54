"""What a recipe may say. Every setting is checked before anything runs."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from secateur.core.allocate import check_sparsity


class Strict(BaseModel):
    """Refuses unknown settings, and a string where a number is meant."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Call(Strict):
    """A function of the user's own, ``package.module:function``, and its arguments; a bare string has none."""

    call: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    args: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"call": value} if isinstance(value, str) else value


class Training(Strict):
    """A stretch of training."""

    epochs: int = Field(ge=1)
    optimizer: Call = Call(call="torch.optim:AdamW")
    learning_rate: Literal["constant", "linear", "cosine"] = "linear"


class Choice(Strict):
    """What to prune and how, as for `secateur.prune`."""

    criterion: Literal["magnitude", "random"] = "magnitude"
    allocation: str | dict[str, float] = "global"
    pattern: str = "unstructured"
    include: str | list[str] | None = None
    ignore: str | list[str] | None = None
    max_sparsity: float | dict[str, float] | None = None
    min_keep: int = 0


class Prune(Choice):
    """One-shot pruning of the dense network; with a schedule, gradual pruning while it trains anew."""

    schedule: Literal["one-shot", "gradual"] = "one-shot"


class Finetune(Strict):
    """Training after pruning, with the zeros held."""

    epochs: int = Field(ge=1)
    learning_rate: Literal["constant", "linear", "cosine"] = "linear"


class Iterate(Choice):
    """Iterative pruning; one run passes through all sparsities."""

    epochs: int = Field(ge=1)
    rounds: int = Field(default=1, ge=1)
    rewind: int | Literal["init", "lr", "linear", "finetune"] = "init"
    control: Literal["reinit", "random"] | None = None


class Method(Strict):
    """A way from the dense network to each sparsity: ``prune``, ``prune`` and ``finetune``, or ``iterate``."""

    prune: Prune | None = None
    finetune: Finetune | None = None
    iterate: Iterate | None = None

    @property
    def way(self) -> Choice:
        """What is pruned, and how."""
        found = self.prune or self.iterate
        assert found is not None
        return found

    @model_validator(mode="after")
    def _one_way(self) -> Method:
        if (self.prune is None) == (self.iterate is None):
            raise ValueError("say prune or iterate, one of the two")
        if self.finetune is not None and self.prune is None:
            raise ValueError("finetune goes with prune; iterate trains by itself")
        return self


class Recipe(Strict):
    """A whole experiment: train dense, prune in several ways to several sparsities, compare."""

    version: Literal[1] = 1
    name: str
    folder: str
    seeds: list[int] = [0]
    data: Call
    model: Call
    evaluate: Call | None = None
    train: Training
    sparsities: list[float]
    methods: dict[str, Method]

    @field_validator("methods")
    @classmethod
    def _methods(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name in methods:
            if name == "dense" or not re.fullmatch(r"\w[\w +,.:-]*", name):  # each is a folder
                raise ValueError("a method is named with letters, digits, spaces and +,.:- and not 'dense'")
        return methods

    @field_validator("sparsities")
    @classmethod
    def _sparsities(cls, values: list[float]) -> list[float]:
        for v in values:
            check_sparsity(v)
        if not values or sorted(set(values)) != values:
            raise ValueError("sparsities rise and are not empty")
        return values
