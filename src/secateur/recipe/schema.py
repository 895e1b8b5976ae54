"""What a recipe may say. Every setting is checked before anything runs."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from secateur.core.allocate import check_sparsity
from secateur.core.saliency import NAMED as NEEDING_DATA
from secateur.core.solve import NAMED as SOLVERS
from secateur.train.randomness import check_seed

LearningRate = Literal["constant", "linear", "cosine"]
STAGES = ("prune", "finetune", "iterate", "sparse")
"""Stages that may also stand at the top of a recipe that has one method; it then goes by the name ``pruned``."""


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


class Regularize(Strict):
    """What prepares a network for pruning while it trains, as in `secateur.regularize`."""

    kind: Literal["l1", "weight_decay", "group_lasso"]
    strength: float = Field(ge=0, allow_inf_nan=False)
    include: str | list[str] | None = None
    ignore: str | list[str] | None = None


class Training(Strict):
    """A stretch of training.

    ``loss`` is ``(model, batch) -> scalar``; ``loop`` takes a `secateur.train.engine.Run` and makes its updates, instead.
    """

    epochs: int = Field(ge=1)
    optimizer: Call = Call(call="torch.optim:AdamW")
    learning_rate: LearningRate = "linear"
    warm_up: float = Field(default=0.0, ge=0, lt=1)
    loss: Call | None = None
    loop: Call | None = None
    regularize: Regularize | None = None

    @model_validator(mode="after")
    def _one_loop(self) -> Training:
        if self.loss is not None and self.loop is not None:
            raise ValueError("say loss or loop, one of the two: a loop has a loss of its own")
        return self


class Choice(Strict):
    """What to prune and how, as for `secateur.prune`."""

    criterion: str = "magnitude"
    allocation: str | dict[str, float] = "global"
    pattern: str = "unstructured"
    include: str | list[str] | None = None
    ignore: str | list[str] | None = None
    max_sparsity: float | dict[str, float] | None = None
    min_keep: int = 0


class Schedule(Strict):
    """A schedule of `secateur.schedules` whose target is the sparsity asked for; steps may be counted in epochs."""

    kind: Literal["cubic", "linear", "polynomial", "exponential"] = "cubic"
    begin: float = Field(ge=0, allow_inf_nan=False)
    end: float = Field(gt=0, allow_inf_nan=False)
    every: float = Field(gt=0, allow_inf_nan=False)
    initial: float = 0.0
    power: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    unit: Literal["epochs", "steps"] = "epochs"

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.end <= self.begin:
            raise ValueError(f"a schedule must end after it begins; got begin {self.begin:g}, end {self.end:g}")
        if self.power != 3.0 and self.kind != "polynomial":
            raise ValueError("power goes with kind: polynomial")
        check_sparsity(self.initial, "initial")
        return self


class Calibrate(Strict):
    """What a criterion or solver that needs data gets to see: the first batches of a training epoch, in the seed's order.

    ``blocks`` is as in `secateur.Calibration`.
    """

    batches: int = Field(default=16, ge=1)
    blocks: str | list[str] = "auto"


class Prune(Choice):
    """One-shot pruning of the dense network; with a schedule, gradual pruning while it trains.

    One-shot pruning may look at data: ``criterion`` is then one that asks for statistics, or ``solver`` also moves what stays;
    ``calibration`` says on how much. A loss, where one is needed, is that of the training.

    Gradual pruning begins with the network as it is initialised, over the epochs of ``train`` and ``finetune`` together; with
    ``start: dense`` it begins with the trained dense network, over the epochs of ``finetune``.
    """

    solver: str | None = None
    calibration: Calibrate | None = None
    schedule: Literal["one-shot", "gradual"] | Schedule = "one-shot"
    start: Literal["init", "dense"] = "init"

    @property
    def looks(self) -> bool:
        """Whether it looks at data."""
        return self.solver is not None or self.criterion in NEEDING_DATA

    @model_validator(mode="after")
    def _known(self) -> Prune:
        if self.criterion not in ("magnitude", "random", *NEEDING_DATA):
            raise ValueError(f"criterion is magnitude, random or, from data, {', '.join(NEEDING_DATA)}")
        if self.solver is not None and self.solver not in SOLVERS:
            raise ValueError(f"solver is one of {', '.join(SOLVERS)}")
        if self.calibration is not None and not self.looks:
            raise ValueError("calibration goes with a criterion or solver that looks at data")
        if self.looks and self.schedule != "one-shot":
            raise ValueError("a criterion or solver that looks at data prunes once: schedule: one-shot")
        return self


class Finetune(Strict):
    """Training after pruning, with the zeros held; the optimizer is that of ``train``."""

    epochs: int = Field(ge=1)
    learning_rate: LearningRate = "linear"
    warm_up: float = Field(default=0.0, ge=0, lt=1)


class Iterate(Choice):
    """Iterative pruning; one run passes through all sparsities.

    From each to the next it takes as many rounds as it needs for none to take more than ``rate`` of what is left, or
    ``rounds``; rounds of one such way take the same share. What ``controls`` train beside the rounds are methods of their
    own in the results: the name, a comma, and ``reinit`` or ``random``. ``epochs`` is the length of a round where the weights
    stay; rounds that rewind to ``init`` or to a step end where the dense training does.
    """

    epochs: int = Field(ge=1)
    rate: float = Field(default=0.2, gt=0, lt=1)
    rounds: int | None = Field(default=None, ge=1)
    rewind: int | Literal["init", "lr", "linear", "finetune"] = "init"
    controls: list[Literal["reinit", "random"]] = []

    @field_validator("criterion")
    @classmethod
    def _by_magnitude(cls, criterion: str) -> str:
        if criterion != "magnitude":
            raise ValueError("iterate prunes by magnitude; for random masks say controls: [random]")
        return criterion


class Sparse(Strict):
    """Training that is sparse from the start: a random mask that stays, or that moves (`secateur.dynamic`).

    ``every`` counts steps; ``end`` is the share of the training after which the mask stays.
    """

    method: Literal["static", "set", "rigl"] = "rigl"
    allocation: str | dict[str, float] = "erk"
    include: str | list[str] | None = None
    ignore: str | list[str] | None = None
    every: int = Field(default=100, ge=1)
    drop: float = Field(default=0.3, gt=0, lt=1)
    end: float = Field(default=0.75, gt=0, le=1)


class Dense(Strict):
    """The control that prunes nothing: a dense network of about as many parameters as a pruned one has that are not zero.

    ``model`` is called with ``density=``, one minus the sparsity. It trains from its own start, over the epochs of ``train`` and
    ``finetune`` together.
    """

    model: Call


class Method(Strict):
    """A way to each sparsity: ``prune``, ``prune`` and ``finetune``, ``iterate``, ``sparse``, or the control ``dense``.

    ``train`` replaces the recipe's training for this method, also that of the dense network it begins with.
    """

    train: Training | None = None
    prune: Prune | None = None
    finetune: Finetune | None = None
    iterate: Iterate | None = None
    sparse: Sparse | None = None
    dense: Dense | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Method:
        if sum(way is not None for way in (self.prune, self.iterate, self.sparse, self.dense)) != 1:
            raise ValueError("say prune, iterate, sparse or dense, one of the four")
        if self.finetune is not None and self.prune is None and self.dense is None:
            raise ValueError("finetune goes with prune or dense; iterate and sparse train by themselves")
        if self.prune is not None and self.prune.start == "dense":
            if self.prune.schedule == "one-shot" or self.finetune is None:
                raise ValueError("start: dense is for gradual pruning over the epochs of finetune; say both")
        return self


class Export(Strict):
    """Which network goes to ``export/`` in the run's folder: with ``save_pretrained`` if it has that, else safetensors."""

    method: str
    sparsity: float
    seed: int | None = None


class Compare(Strict):
    """What ``secateur compare`` holds the methods against, and by which metric: the first one unless named."""

    baseline: str | None = None
    metric: str | None = None


class Recipe(Strict):
    """A whole experiment: train dense, prune in several ways to several sparsities, compare.

    ``lower_is_better`` names the metrics of which less is better.
    ``threads`` are torch's on the CPU; results are the same to the bit for the same number of them.
    ``quick`` and ``full`` are other forms of it: settings that take the place of those here, by their dotted names.
    """

    version: Literal[1] = 1
    name: str
    about: str = ""
    folder: str
    seeds: list[int] = [0]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    data: Call
    model: Call
    evaluate: Call | None = None
    lower_is_better: list[str] = []
    train: Training
    sparsities: list[float]
    methods: dict[str, Method]
    compare: Compare | None = None
    export: Export | None = None
    quick: dict[str, Any] = {}
    full: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_method(cls, value: Any) -> Any:
        if isinstance(value, dict) and "methods" not in value and any(s in value for s in STAGES):
            rest = {k: v for k, v in value.items() if k not in STAGES}
            return {**rest, "methods": {"pruned": {k: value[k] for k in STAGES if k in value}}}
        return value

    @field_validator("methods")
    @classmethod
    def _methods(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name in methods:
            if name == "dense" or not re.fullmatch(r"\w[\w +,.:-]{0,59}", name):  # each is a folder
                raise ValueError(
                    "a method is named with letters, digits, spaces and +,.:-, 60 at most, and not 'dense'"
                )
        for name, method in methods.items():
            for control in [] if method.iterate is None else method.iterate.controls:
                if f"{name}, {control}" in methods:
                    raise ValueError(f"'{name}, {control}' is the name of a control already; call the method otherwise")
        return methods

    @field_validator("sparsities")
    @classmethod
    def _sparsities(cls, values: list[float]) -> list[float]:
        for v in values:
            check_sparsity(v)
        if not values or sorted(set(values)) != values or not values[0]:
            raise ValueError("sparsities rise from above 0 and are not empty; the dense network is trained anyway")
        if len({f"{v:g}" for v in values}) < len(values):
            raise ValueError("sparsities differ in their first six digits, which name the folders of the results")
        return values

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError("seeds are not empty, and none is there twice: it would be counted as a run of its own")
        return [check_seed(seed) for seed in seeds]

    def names(self) -> list[str]:
        """The methods as they stand in the results, each followed by its controls."""
        found = []
        for name, method in self.methods.items():
            controls = [] if method.iterate is None else method.iterate.controls
            found += [name, *(f"{name}, {control}" for control in controls)]
        return found

    @model_validator(mode="after")
    def _compared(self) -> Recipe:
        baseline = None if self.compare is None else self.compare.baseline
        if baseline is not None and baseline not in self.names():
            raise ValueError(f"compare.baseline is a method of this recipe: {', '.join(self.names())}")
        return self

    @model_validator(mode="after")
    def _exported(self) -> Recipe:
        e = self.export
        if e is not None and (e.method not in self.methods or e.sparsity not in self.sparsities):
            raise ValueError("export names a method and a sparsity of this recipe")
        if e is not None and e.seed is not None and e.seed not in self.seeds:
            raise ValueError("export names a seed of this recipe")
        return self
